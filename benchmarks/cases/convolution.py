"""The benchmark cases of `PatchConvConfig`: convolutional networks without gradients, whole and in parts.

B images of C channels, H x W pixels or latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.sentences import PackageMissing

from .case import Case
from .models import transformer


def _as_it_is(model: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a case's model.

    Attributes:
        settings: what `PatchConvConfig` gets besides the size; None for a way without memsave.
        budget: its `budget_bytes`: "smallest" for the fewest that it has a plan for, or the name of an earlier way for
            what that one allocates. A way that memsave has no plan for is left out, with the reason.
        prepare: changes the plain model in place.
        channels_last: the memory format of the model and of the image.
        exact: whether its output must be that of the first way.
    """

    name: str
    settings: Mapping[str, Any] | None = None
    budget: str | None = None
    prepare: Callable[[Any], object] = _as_it_is
    channels_last: bool = False
    exact: bool = True


WAYS = (
    Way(name="whole"),
    Way(name="whole, channels_last", channels_last=True, exact=False),
    Way(name="memsave stream", settings={"schedule": "stream"}),
    Way(name="memsave patch", settings={"schedule": "patch"}),
    Way(name="memsave stream, smallest", settings={"schedule": "stream"}, budget="smallest"),
    Way(name="memsave patch, smallest", settings={"schedule": "patch"}, budget="smallest"),
)
# Each beside what memsave does in as many bytes. A tile's norms and attention see only the tile: it is not exact.
TILING = (
    Way(name="diffusers tiling", prepare=lambda vae: vae.enable_tiling(), exact=False),
    Way(name="memsave stream, at tiling's memory", settings={"schedule": "stream"}, budget="diffusers tiling"),
)
SLICING = (
    Way(name="diffusers slicing", prepare=lambda vae: vae.enable_slicing()),
    Way(name="memsave stream, at slicing's memory", settings={"schedule": "stream"}, budget="diffusers slicing"),
)


@dataclass(frozen=True, kw_only=True)
class ConvolutionCase(Case):
    """One forward of a convolutional network without gradients, in fp32; the image and the weights exist before.

    Attributes:
        model: makes the plain model in evaluation; called after seeding, so always the same.
        forward: what of the model's output is used.
        shape: (B, C, H, W) of the image.
        planned: the module that memsave converts, "" for the model. It is called with one tensor of `shape`.
        ways: the first is the one that the others are compared with.
        most_rounds: turns of each way are at most so many, for a case that takes long.
    """

    kind: ClassVar[str] = "convolution"

    model: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, int, int, int]
    planned: str = ""
    ways: tuple[Way, ...] = WAYS
    most_rounds: int = 9
    method: str | None = "patch_conv"
    devices: tuple[str, ...] = ("cpu", "cuda")
    tiny: Mapping[str, Any] = field(default_factory=lambda: {"shape": (1, 3, 64, 64)})

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"image": list(self.shape), "dtype": "float32"}


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


def decoded(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """The model in evaluation, with random weights and statistics under which activations keep their size."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def network(config_class: str, model_class: str, settings: Mapping[str, object]) -> nn.Module:
    return settled(transformer(config_class, model_class, settings))


def classifier(name: str, settings: Mapping[str, object]) -> nn.Module:
    return network(f"{name}Config", f"{name}ForImageClassification", {"num_labels": 1000, **settings})


def vae(**changed: object) -> nn.Module:
    """An autoencoder with the structure of Stable Diffusion's at a sixteenth of its width.

    With `sample_size` 512, diffusers' tiles are 64 x 64 latents, which are 512 x 512 pixels, as there.

    Raises:
        PackageMissing: diffusers is not installed, and how it is.
    """
    if find_spec("diffusers") is None:
        raise PackageMissing("diffusers is not installed: pip install 'memsave[bench]'")
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {"block_out_channels": (8, 16, 32, 32), "layers_per_block": 2, "norm_num_groups": 8}
    settings |= {"sample_size": 512, **changed}
    blocks = len(settings["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    return settled(AutoencoderKL(**kinds, **settings))


_EFFICIENTNET_B0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "hidden_dim": 1280}
_MOBILENET = ConvolutionCase(
    name="patch_conv_mobilenet_v2_224",
    title="MobileNetV2 without gradients, an image of 224 x 224 pixels, fp32",
    model=partial(classifier, "MobileNetV2", {}),
    forward=logits,
    shape=(1, 3, 224, 224),
    expected_s=15,
)
# Tiles of a toy are 8 x 8 latents, with two blocks between them and the pixels.
_TINY_VAE = partial(vae, block_out_channels=(8, 16), layers_per_block=1, sample_size=16)
_VAE = ConvolutionCase(
    name="patch_conv_vae",
    title="the decoder of an autoencoder without gradients",
    model=vae,
    forward=decoded,
    planned="decoder",
    shape=(1, 4, 64, 64),
    ways=WAYS[:4],
    most_rounds=5,
    expected_s=15,
    tiny={"model": _TINY_VAE, "shape": (1, 4, 16, 16)},
)

CONVOLUTION_CASES = (
    _MOBILENET,
    replace(
        _MOBILENET,
        name="patch_conv_mobilenet_v2_1024",
        title="MobileNetV2 without gradients, an image of 1024 x 1024 pixels, fp32",
        shape=(1, 3, 1024, 1024),
        expected_s=45,
    ),
    ConvolutionCase(
        name="patch_conv_resnet50_2048",
        title="ResNet-50 without gradients, an image of 2048 x 2048 pixels, fp32",
        model=partial(classifier, "ResNet", {}),
        forward=logits,
        shape=(1, 3, 2048, 2048),
        most_rounds=2,
        expected_s=300,
        tiny={
            "model": partial(
                classifier, "ResNet", {"embedding_size": 16, "hidden_sizes": (16, 32, 32, 64), "depths": (1, 1, 1, 1)}
            ),
            "shape": (1, 3, 64, 64),
        },
    ),
    replace(
        _VAE,
        name="patch_conv_vae_64",
        title="the decoder of an autoencoder without gradients, four times 64 x 64 latents to 512 x 512 pixels, fp32",
        shape=(4, 4, 64, 64),
        ways=(*WAYS[:4], *SLICING),
        most_rounds=3,
        expected_s=180,
        tiny={"model": _TINY_VAE, "shape": (2, 4, 8, 8)},
    ),
    replace(
        _VAE,
        name="patch_conv_vae_128",
        title="the decoder of an autoencoder without gradients, 128 x 128 latents to 1024 x 1024 pixels, fp32",
        shape=(1, 4, 128, 128),
        ways=(*WAYS[:4], *TILING),
        most_rounds=3,
        expected_s=180,
    ),
    replace(
        _VAE,
        name="patch_conv_vae_256",
        title="the decoder of an autoencoder without gradients, 256 x 256 latents to 2048 x 2048 pixels, fp32",
        shape=(1, 4, 256, 256),
        ways=(WAYS[0], WAYS[2], *TILING),
        most_rounds=2,
        expected_s=900,
    ),
    ConvolutionCase(
        name="patch_conv_efficientnet_224",
        title="EfficientNet-B0 without gradients, an image of 224 x 224 pixels, fp32",
        model=partial(classifier, "EfficientNet", _EFFICIENTNET_B0),
        forward=logits,
        shape=(1, 3, 224, 224),
        ways=WAYS[:4],
        expected_s=15,
    ),
    ConvolutionCase(
        name="patch_conv_convnext_224",
        title="ConvNeXt-T without gradients, an image of 224 x 224 pixels, fp32",
        model=partial(classifier, "ConvNext", {}),
        forward=logits,
        shape=(1, 3, 224, 224),
        ways=WAYS[:4],
        expected_s=15,
    ),
    ConvolutionCase(
        name="patch_conv_segformer_512",
        title="SegFormer-B0 without gradients, an image of 512 x 512 pixels, fp32",
        model=partial(network, "SegformerConfig", "SegformerForSemanticSegmentation", {"num_labels": 150}),
        forward=logits,
        shape=(1, 3, 512, 512),
        ways=WAYS[:4],
        expected_s=15,
    ),
)
