"""PatchConvConfig: the planned model is the plain one, whatever is done to it, and can be had back."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import ConflictError, PatchConvConfig
from memsave.config import applied_configs
from memsave.slicing import dispatcher

from ..slicing.harness import lively
from ..snapshot import bits, snapshot
from .cnns import (
    SCHEDULES,
    SIZE,
    Classifier,
    ConvBlock,
    Flat,
    assert_same,
    convert,
    counts,
    error,
    image,
    pair,
    run,
)

schedules = pytest.mark.parametrize("schedule", SCHEDULES)
both = pytest.mark.parametrize("make", [Classifier, Flat])


@schedules
@both
def test_every_size_of_image_and_batch_gives_what_the_plain_model_gives(schedule: str, make: Any) -> None:
    dtype = torch.float32 if make is Flat else torch.float64
    plain, planned = pair(make, schedule, dtype)
    shapes = [SIZE, (3, 3, 40, 40), (1, 3, 37, 53), (2, 3, 17, 90)]
    for shape in shapes:
        assert_same(planned, plain, image(*shape, dtype=dtype))
    assert counts(planned) == {"planned": len(shapes)}
    assert [plan.inputs for plan in memsave.patch_plans(planned)] == [(shape,) for shape in shapes]


@schedules
@pytest.mark.filterwarnings("ignore:.*it runs plainly")
@pytest.mark.parametrize("shape", [(1, 3, 7, 5), (2, 3, 2, 40), (1, 3, 1, 1)])
def test_images_smaller_than_what_an_output_sees_are_no_less_exact(schedule: str, shape: Any) -> None:
    plain, planned = pair(Classifier, schedule, torch.float64)
    assert_same(planned, plain, image(*shape, dtype=torch.float64))


@schedules
def test_inputs_with_the_channels_last_or_spread_over_memory(schedule: str) -> None:
    plain, planned = pair(Classifier, schedule)
    x = image(2, 3, 40, 40)
    given = {
        "channels last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3),
        "every other row": image(2, 3, 80, 40)[:, :, ::2],
        "one channel three times": x[:, :1].expand(2, 3, 40, 40),
    }
    for t in given.values():
        before = bits(t)
        assert_same(planned, plain, t)
        assert bits(t) == before
    assert counts(planned) == {"planned": len(given)}


def test_a_size_is_planned_once_and_batches_from_two_on_share_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, planned = pair()
    made: list[str] = []
    for name in ("trace", "make_plan"):
        real = getattr(dispatcher, name)
        monkeypatch.setattr(dispatcher, name, lambda *a, n=name, r=real, **k: made.append(n) or r(*a, **k))
    for shape in (SIZE, SIZE, (2, 3, 40, 40), (5, 3, 40, 40), (2, 3, 40, 40), SIZE):
        assert_same(planned, plain, image(*shape))
    assert made == ["trace", "make_plan", "make_plan"]
    assert_same(planned, plain, image(2, 3, 44, 40))
    assert made[3:] == ["trace", "make_plan"]


class AsksForTheBatch(Flat):
    """Does something else for one image, for many, and for an odd number."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if x.shape[0] == 1:
            y = y + 1
        if x.shape[0] > 4:
            y = y * 2
        return -y if x.shape[0] % 2 else y


class AsksForOne(Flat):
    """A trace for two and more says nothing of this."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).exp() if x.shape[0] == 1 else super().forward(x)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("asks", [AsksForTheBatch, AsksForOne])
def test_a_forward_that_asks_for_the_size_of_the_batch(asks: type[nn.Module], first: int) -> None:
    plain = lively(asks())
    planned = copy.deepcopy(plain)
    convert(planned, input_size=(first, *SIZE[1:]))
    for batch in (2, 1, 3, 4, 6, 5, 2, 1):
        assert_same(planned, plain, image(batch, 3, 40, 40))
    assert counts(planned) == {"planned": 8}


@schedules
def test_what_a_conversion_leaves_as_it_is(schedule: str) -> None:
    plain, _ = pair()
    seen: list[nn.Module] = []
    handle = plain.head.register_forward_hook(lambda module, args, output: seen.append(module))
    before = snapshot(plain)
    convert(plain, schedule)
    after = snapshot(plain)
    for module in after["modules"].values():
        module["attributes"] = [k for k in module["attributes"] if k not in ("forward", "_memsave")]
        module["converted by"] = []
    assert after == before
    run(plain, image())
    assert seen == [plain.head]  # a hook beside the planned module is called, and needs no plain run
    assert counts(plain) == {"planned": 1}
    handle.remove()
    memsave.restore_model(plain)
    assert "forward" not in plain.features.__dict__


def test_hooks_of_the_planned_module_itself_are_called() -> None:
    plain, planned = pair()
    seen: list[Tensor] = []
    planned.features.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    planned.features.register_forward_hook(lambda module, args, output: seen.append(output))
    for x in (image(), image(1, 3, 36, 36)):  # the other is planned while there are hooks
        assert error(run(planned, x), run(plain, 2 * x)) <= 1e-5
    assert [tuple(t.shape) for t in seen] == [(1, 12), (1, 12)]
    assert counts(planned) == {"planned": 2}


@schedules
@both
def test_a_deep_copy_keeps_the_plans_and_not_the_weights(
    schedule: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, planned = pair(make, schedule)
    copied = copy.deepcopy(planned)
    monkeypatch.setattr(dispatcher, "trace", None)  # not called
    monkeypatch.setattr(dispatcher, "make_plan", None)
    for p in planned.parameters():
        p.data.zero_()
    assert_same(copied, plain)
    assert (counts(copied), counts(planned)) == ({"planned": 1}, {})


def _by_torch(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@schedules
@both
@pytest.mark.parametrize("through", [lambda m: pickle.loads(pickle.dumps(m)), _by_torch], ids=["pickle", "torch"])
def test_a_pickled_model_plans_again(schedule: str, make: Any, through: Callable[[nn.Module], nn.Module]) -> None:
    plain, planned = pair(make, schedule)
    loaded = through(planned)
    assert memsave.patch_plans(loaded) == []
    assert_same(loaded, plain)
    assert counts(loaded) == {"planned": 1}
    found, (expected, *_) = memsave.patch_plans(loaded)[0], memsave.patch_plans(planned)
    assert (found.module, found.stages, found.peak_bytes) == (expected.module, expected.stages, expected.peak_bytes)
    memsave.restore_model(loaded)
    assert snapshot(loaded)["keys"] == snapshot(plain)["keys"] and memsave.patch_plans(loaded) == []


@schedules
def test_save_and_load(schedule: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors (pip install 'memsave[hf]')")
    plain, planned = pair(schedule=schedule)
    memsave.save(planned, tmp_path / "model")
    loaded = memsave.load(tmp_path / "model", Classifier()).eval()
    assert applied_configs(loaded) == applied_configs(planned)
    assert_same(loaded, plain)
    assert counts(loaded) == {"planned": 1}
    assert memsave.patch_plans(loaded)[0].stages == memsave.patch_plans(planned)[0].stages


@both
def test_restore_gives_the_model_back(make: Any) -> None:
    plain, _ = pair(make)
    before = snapshot(plain)
    convert(plain)
    report = memsave.restore_model(plain)
    assert "patch_conv" in str(report)
    after = snapshot(plain)
    for module in after["modules"].values():
        module["attributes"] = [k for k in module["attributes"] if k != "_memsave"]
    assert after == before
    assert all(m.forward.__func__ is type(m).forward for m in plain.modules())


def test_converting_again() -> None:
    _, planned = pair()
    before = snapshot(planned)
    report = convert(planned)
    assert "already" in str(report) and snapshot(planned) == before
    with pytest.raises(ConflictError, match=r"it is converted by .*restore_model\(model, methods=\[\"patch_conv\"\]\)"):
        convert(planned, num_patches=5)
    assert snapshot(planned) == before


def test_a_dry_run_changes_nothing_and_shows_the_plan(unchanged: Any) -> None:
    plain, planned = pair()
    report = memsave.convert_model(unchanged(plain), PatchConvConfig(input_size=SIZE, num_patches=4), dry_run=True)
    assert str(memsave.patch_plans(planned)[0]) in str(report)
    assert "features" in str(report) and "dry run" in str(report)


class WithNorm(nn.Module):
    """A LayerNorm, which the default methods convert, behind the maps and over their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm, self.head = NormedFeatures(), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)))


class NormedFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = ConvBlock(3, 8), nn.LayerNorm(8), ConvBlock(8, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.second(x).mean((2, 3))


def test_defaults_do_not_plan_and_go_together_with_plans() -> None:
    plain = lively(WithNorm())
    defaults, before, after = (copy.deepcopy(plain) for _ in range(3))
    assert "patch_conv" not in str(memsave.convert_model(defaults)) and memsave.patch_plans(defaults) == []
    memsave.convert_model(before)
    convert(before)
    convert(after)
    assert_same(after, plain)
    memsave.convert_model(after)
    for model in (before, after):
        assert_same(model, plain)
        assert "planned" in counts(model)
        assert {"patch_conv"} < {name for m in model.modules() for name in applied_configs(m)}
        memsave.restore_model(model, methods=["patch_conv"])
        assert_same(model, plain)
        memsave.restore_model(model)
        assert snapshot(model)["keys"] == snapshot(plain)["keys"]
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_the_signature_and_what_is_made_of_the_model_are_the_plain_ones() -> None:
    plain, planned = pair(Flat)
    assert inspect.signature(planned.forward) == inspect.signature(plain.forward)
    x = image(2, 3, 40, 40)
    expected = run(plain, x)
    made = {
        "torch.export": torch.export.export(planned, (x,)).module(),
        "torch.fx": torch.fx.symbolic_trace(nn.Sequential(planned)),
        "torch.jit": torch.jit.trace(planned, x, check_trace=False),
        "torch.compile": torch.compile(planned, backend="eager", fullgraph=True),
    }
    for name, model in made.items():
        assert torch.equal(run(model, x), expected), name
    assert any(node.target is torch.ops.aten.conv2d.default for node in made["torch.export"].graph.nodes)
    assert counts(planned) == {"it was traced": 1}


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = ConvBlock(3, 8), ConvBlock(3, 8)
        self.both = ConvBlock(16, 8, 2)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        return {"map": self.both(torch.cat((self.left(x), self.right(other)), 1)), "sum": x + other}


@schedules
@pytest.mark.parametrize("batches", [(1, 1), (2, 2), (3, 1)])
def test_two_images_planned_for_a_batch_of_data(schedule: str, batches: tuple[int, int]) -> None:
    plain = lively(TwoImages())
    planned = copy.deepcopy(plain)
    first = image(2, 3, 40, 40), image(2, 3, 40, 40) + 1
    config = PatchConvConfig(schedule=schedule, input_size=None, num_patches=3)
    with pytest.raises(ValueError, match="needs batches of data"):
        memsave.convert_model(planned, config)
    memsave.convert_model(planned, config, calibration=[first])
    x, other = image(batches[0], 3, 40, 40), image(batches[1], 3, 40, 40).flip(2)
    if batches[0] != batches[1]:  # neither can put maps of different batches side by side
        with pytest.raises(RuntimeError, match="(?i)size"):
            run(plain, x, other)
        with pytest.raises(RuntimeError, match="(?i)size"), pytest.warns(UserWarning, match="it runs plainly"):
            run(planned, x, other)
        return
    found, expected = run(planned, x, other), run(plain, x, other)
    assert list(found) == list(expected)
    assert all(error(found[name], expected[name]) <= 1e-5 for name in expected)
    assert counts(planned) == {"planned": 1}
