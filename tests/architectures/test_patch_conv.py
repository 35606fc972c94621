"""PatchConvConfig on the networks of transformers and diffusers: the same outputs, in the bytes that it predicts.

x is (B, C, H, W), or (B, C, T, H, W) for a video.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import memsave
from memsave import PatchConvConfig

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

SCHEDULES = ("stream", "patch")
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


def lively(model: nn.Module) -> nn.Module:
    """In evaluation, with weights under which activations neither vanish nor grow, and norms that differ by channel."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
        if isinstance(module, NORMS) and module.weight is not None:
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return model.eval()


@dataclass(frozen=True)
class Network:
    """One network and what it is called with.

    Attributes:
        make: builds it.
        size: of the input.
        most: at most this share of the plain call's bytes in bands and in tiles: what was measured, and about a fifth.
    """

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    most: tuple[float, float]


class UNet(nn.Module):
    """Skips over all levels, pooling down and transposed convolutions up."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels]
        self.down = nn.ModuleList(self._level(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[:-1])
        self.up = nn.ModuleList(self._level(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(channels, 2, 1)

    def _level(self, inputs: int, outputs: int) -> nn.Module:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.GroupNorm(4, outputs), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, level in enumerate(self.down):
            x = level(nn.functional.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for level, raised, skip in zip(self.up[::-1], self.raise_[::-1], skips[-2::-1], strict=True):
            x = level(torch.cat((skip, raised(x)), 1))
        return self.head(x)


def hf(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**settings))


def upernet() -> nn.Module:
    sizes = [16, 32, 48, 64]
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = transformers.ResNetConfig(out_features=stages, embedding_size=16, hidden_sizes=sizes, depths=[1] * 4)
    config = transformers.UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False)
    return transformers.UperNetForSemanticSegmentation(config)


def _diffusers() -> Any:
    return pytest.importorskip("diffusers", reason="needs diffusers, which only this file uses (pip install diffusers)")


def autoencoder() -> nn.Module:
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    settings = {"down_block_types": down, "up_block_types": up, "layers_per_block": 1, "norm_num_groups": 8}
    return _diffusers().AutoencoderKL(block_out_channels=(16, 32, 32), **settings).decoder


def video() -> nn.Module:
    """HunyuanVideo's decoder: causal 3-D convolutions."""
    widths = (16, 16, 32, 32)
    settings = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    return _diffusers().AutoencoderKLHunyuanVideo(block_out_channels=widths, **settings).decoder


def unet() -> nn.Module:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = _diffusers().UNet2DModel(
                in_channels=3,
                out_channels=3,
                block_out_channels=(16, 32),
                layers_per_block=1,
                norm_num_groups=8,
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
                add_attention=False,
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.unet(x, 3).sample

    return Denoiser()


def images(name: str, model: str, most: tuple[float, float], size: int = 160, **settings: Any) -> Network:
    task = "ForSemanticSegmentation" if model == "Segformer" else "ForImageClassification"
    return Network(name, hf(f"{model}{task}", f"{model}Config", **settings), (1, 3, size, size), most)


SMALL = {"embedding_size": 32, "hidden_sizes": [64, 96, 128, 192]}
EFFICIENT = {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640}
SEGFORMER = {"depths": [1] * 4, "hidden_sizes": [16, 32, 64, 96], "decoder_hidden_size": 64}
NETWORKS = (
    images("MobileNetV2", "MobileNetV2", (0.19, 0.19)),
    images("MobileNetV1", "MobileNetV1", (0.42, 0.42), depth_multiplier=0.5),
    images("ResNet-18", "ResNet", (0.36, 0.47), **SMALL | {"layer_type": "basic", "hidden_sizes": [32, 48, 64, 96]}),
    images("ResNet-50", "ResNet", (0.7, 0.62), **SMALL, depths=[1, 1, 1, 1]),
    images("RegNet", "RegNet", (0.5, 0.55), **SMALL, depths=[1, 1, 1, 1], groups_width=16),
    images("EfficientNet", "EfficientNet", (0.38, 0.33), image_size=160, **EFFICIENT),
    images("ConvNext", "ConvNext", (0.5, 0.45), hidden_sizes=[32, 48, 64, 96], depths=[1, 1, 1, 1]),
    images("Segformer", "Segformer", (0.45, 0.35), 128, **SEGFORMER),
    Network("UperNet", upernet, (1, 3, 128, 128), (0.48, 0.48)),
    Network("U-Net", UNet, (1, 3, 96, 96), (0.52, 0.62)),
    Network("AutoencoderKL", autoencoder, (1, 4, 24, 24), (0.66, 0.8)),
    Network("UNet2DModel", unet, (1, 3, 64, 64), (0.58, 0.58)),
    Network("HunyuanVideo", video, (1, 4, 2, 8, 8), (0.52, 0.67)),
)
BY_NAME = {network.name: network for network in NETWORKS}
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@cache
def plain(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return lively(BY_NAME[name].make())


@cache
def _planned(name: str, schedule: str) -> Any:
    model = copy.deepcopy(plain(name))
    memsave.convert_model(model, PatchConvConfig(schedule=schedule, input_size=BY_NAME[name].size))
    return model


def planned(name: str, schedule: str) -> Any:
    """A fresh copy: its plans are those of the first."""
    return copy.deepcopy(_planned(name, schedule))


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_close(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert a.shape == b.shape and b.abs().max() > 1e-3
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def measured(call: Callable[[], Any]) -> int:
    with torch.no_grad():
        return memsave.measure(call).by_category["temporary"]


@schedules
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_outputs_and_bytes(network: Network, schedule: str) -> None:
    before, model = plain(network.name), planned(network.name, schedule)
    x = torch.randn(network.size, generator=torch.Generator().manual_seed(2))
    (plan,) = memsave.patch_plans(model)
    calls: list[Any] = []
    inner = model.get_submodule(plan.module)
    handle = inner.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        assert_close(model(x), before(x))
    handle.remove()
    ((args, kwargs),) = calls
    ours, theirs = measured(lambda: model(x)), measured(lambda: before(x))
    assert ours <= network.most[SCHEDULES.index(schedule)] * theirs
    assert measured(lambda: inner(*args, **kwargs)) == plan.peak_bytes
    twin = before.get_submodule(plan.module)
    assert measured(lambda: twin(*args, **kwargs)) == plan.plain_peak_bytes
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        inner(*args, **kwargs)
    assert counter.get_total_flops() == 2 * plan.macs
    assert dict(plan.calls) == {"planned": 4}


@pytest.mark.parametrize("name", ["MobileNetV2", "ConvNext", "Segformer"])
def test_hidden_states_are_the_plain_models(name: str) -> None:
    before, model = copy.deepcopy(plain(name)), planned(name, "patch")
    x = torch.randn(BY_NAME[name].size, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        with torch.no_grad():
            found, expected = (m(x, output_hidden_states=True) for m in (model, before))
            assert len(found.hidden_states) == len(expected.hidden_states) > 2
            for a, b in zip(tensors(found), tensors(expected), strict=True):
                assert torch.equal(a, b)  # by the very same ops
            found, expected = model(x), before(x)
        assert_close(found, expected)
        assert found.keys() == expected.keys() and found.hidden_states is None
    counts = dict(memsave.patch_plans(model)[0].calls)
    assert counts.pop("planned") == 2 and sum(counts.values()) == 2


def test_a_config_that_asks_for_other_outputs() -> None:
    before, model = copy.deepcopy(plain("ResNet-18")), planned("ResNet-18", "patch")
    x = torch.randn(BY_NAME["ResNet-18"].size, generator=torch.Generator().manual_seed(2))
    for setting in ("output_hidden_states", "return_dict"):
        for m in (before, model):
            m.config.__dict__[setting] = setting == "output_hidden_states"
        with torch.no_grad():
            found, expected = model(x), before(x)
        assert_close(found, expected)
        for m in (before, model):
            m.config.__dict__[setting] = setting != "output_hidden_states"


@pytest.mark.parametrize(("schedule", "size"), [("stream", 224), ("patch", None)], ids=["224", "427x640"])
def test_a_photograph(schedule: str, size: int | None) -> None:
    """The rows of noise are alike; those of a photograph are not."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photographs")
    photographs = datasets.load_sample_images()
    (china,) = (i for i, name in enumerate(photographs.filenames) if name.endswith("china.jpg"))
    x = torch.from_numpy(photographs.images[china].copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    if size is not None:
        x = nn.functional.interpolate(x, (size, size), mode="bilinear", antialias=True)
    else:
        assert x.shape == (1, 3, 427, 640)
    before, model = plain("MobileNetV2"), planned("MobileNetV2", schedule)
    with torch.no_grad():
        found, expected = model(x).logits, before(x).logits
    assert_close(found, expected)
    assert found.argsort().tolist() == expected.argsort().tolist()
    plan = memsave.patch_plans(model)[-1]
    assert plan.inputs == (tuple(x.shape),) and dict(plan.calls) == {"planned": 1}
    assert plan.peak_bytes < 0.25 * plan.plain_peak_bytes
