"""PatchConvConfig: what a plan predicts is what is measured, budgets and wishes are kept, and what it shows."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import memsave
from memsave import PatchConvConfig, UnsupportedModelError

from ..slicing.harness import lively
from .cnns import SCHEDULES, SIZE, Classifier, ConvBlock, Flat, assert_same, convert, image, pair, run

schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def measured(model: nn.Module, x: Tensor) -> int:
    """The most bytes of a call, its inputs and the model's tensors not counted."""
    with torch.no_grad():
        return memsave.measure(lambda: model(x)).by_category["temporary"]


def plan_of(model: nn.Module, *shape: int) -> memsave.slicing.plan.Plan:
    return next(plan for plan in memsave.patch_plans(model) if plan.inputs == (shape,))


@schedules
@pytest.mark.parametrize("make", [Classifier, Flat])
def test_bytes_and_multiply_accumulates_are_as_predicted(schedule: str, make: Any) -> None:
    plain, planned = pair(make, schedule)
    name = memsave.patch_plans(planned)[0].module
    ours, theirs = (model.get_submodule(name) for model in (planned, plain))
    for shape in (SIZE, (2, 3, 40, 40), (1, 3, 61, 33)):
        x = image(*shape)
        assert_same(ours, theirs, x)
        plan = plan_of(planned, *shape)
        assert plan.peak_bytes == measured(ours, x)
        assert plan.plain_peak_bytes == measured(theirs, x)
        assert plan.peak_bytes < plan.plain_peak_bytes
        for model, macs in ((ours, plan.macs), (theirs, plan.plain_macs)):
            with FlopCounterMode(display=False) as counter:
                run(model, x)
            assert counter.get_total_flops() == 2 * macs
        assert sum(stage.macs for stage in plan.stages) == pytest.approx(plan.macs, rel=0.02)
        assert sum(stage.ops for stage in plan.stages) == len(plan.layers)


class Outer(nn.Module):
    """Holds the input of what is planned while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.inner = nn.Sequential(ConvBlock(16, 32), ConvBlock(32, 32, 2), ConvBlock(32, 16))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(self.inner(y)).mean((2, 3)) + y.mean()


BIG = (1, 3, 96, 96)


@schedules
def test_a_call_of_the_whole_model_stays_within_the_budget(schedule: str) -> None:
    plain = lively(Outer())
    x = image(*BIG)
    before = measured(plain, x)
    for budget_bytes in (before - 1, before * 3 // 4, before // 2, before // 3):
        model = copy.deepcopy(plain)
        memsave.convert_model(model, PatchConvConfig(schedule=schedule, input_size=BIG, budget_bytes=budget_bytes))
        assert_same(model, plain, x)
        assert measured(model, x) <= budget_bytes
        assert all(plan.peak_bytes <= budget_bytes for plan in memsave.patch_plans(model))


@schedules
def test_a_budget_that_is_impossible_names_the_smallest_one(schedule: str, unchanged: Any) -> None:
    plain = unchanged(lively(Outer()))
    config = PatchConvConfig(schedule=schedule, input_size=BIG, budget_bytes=1000)
    with pytest.raises(
        UnsupportedModelError, match=r"budget_bytes: expected at least [\d,]+ for these shapes"
    ) as raised:
        memsave.convert_model(plain, config)
    assert "got 1,000. The model was not changed." in str(raised.value)
    least = int(re.search(r"at least ([\d,]+)", str(raised.value))[1].replace(",", ""))  # type: ignore[index]
    x = image(*BIG)
    assert 1000 < least < measured(plain, x) / 2
    model = copy.deepcopy(plain)
    memsave.convert_model(model, PatchConvConfig(schedule=schedule, input_size=BIG, budget_bytes=least))
    assert measured(model, x) <= least
    assert_same(model, plain, x)
    with pytest.raises(UnsupportedModelError, match=f"expected at least {least:,} .* got {least - 1:,}"):
        memsave.convert_model(plain, PatchConvConfig(schedule=schedule, input_size=BIG, budget_bytes=least - 1))


def test_a_budget_that_is_met_anyway(unchanged: Any) -> None:
    plain = unchanged(lively(Outer()))
    needed = measured(plain, image(*BIG))
    with pytest.raises(UnsupportedModelError, match=f"a call needs {needed:,} bytes as it is, which is within budget"):
        memsave.convert_model(plain, PatchConvConfig(input_size=BIG, budget_bytes=needed))


@pytest.mark.parametrize(
    ("schedule", "parts", "how"), [("stream", 5, "5 bands of 8 rows"), ("patch", 4, "4 x 4 tiles")]
)
def test_the_number_of_parts_is_as_wished(schedule: str, parts: int, how: str) -> None:
    plain, _ = pair(Flat)
    model = copy.deepcopy(plain)
    convert(model, schedule, num_patches=parts, split="first")
    plan = memsave.patch_plans(model)[0]
    assert [stage.how for stage in plan.stages] == [how, "whole"]
    assert_same(model, plain)


@schedules
@pytest.mark.parametrize("split", ["features.stem", "features.block.first", "features.block", "features.down.conv"])
def test_the_stage_ends_behind_the_split(schedule: str, split: str) -> None:
    plain, _ = pair()
    model = copy.deepcopy(plain)
    convert(model, schedule, split=split)
    plan = memsave.patch_plans(model)[0]
    prefix = f"{plan.module}." if plan.module else ""
    sliced = [stage for stage in plan.stages if stage.how != "whole"]
    last = f"{prefix}{sliced[-1].last}"
    assert last == split or last.startswith(f"{split}.")
    assert plan.stages[-1].how == "whole" and plan.stages.index(sliced[-1]) == len(plan.stages) - 2
    assert_same(model, plain)
    assert_same(model, plain, image(2, 3, 36, 50))
    assert memsave.patch_plans(model)[1].stages[0].last == plan.stages[0].last


class Attention(nn.Module):
    """Every output pixel reads all pixels."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed.transpose(1, 2).view_as(x)


class Roll(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x, (2, 3), (2, 3))


@pytest.mark.parametrize(
    ("schedule", "inner", "op"),
    [
        ("stream", Attention, "scaled_dot_product_attention"),
        ("patch", Attention, "flatten"),  # rows and columns in one dimension
        ("stream", Roll, "roll"),
        ("patch", Roll, "roll"),
    ],
)
def test_what_cannot_be_computed_in_parts_is_named(schedule: str, inner: type[nn.Module], op: str) -> None:
    plain = lively(nn.Sequential(ConvBlock(3, 8), ConvBlock(8, 8, 2), inner(), ConvBlock(8, 8)))
    model = copy.deepcopy(plain)
    convert(model, schedule)
    plan = memsave.patch_plans(model)[0]
    named = {where: reason for where, reason in plan.ends.items() if where == f"2 ({op})"}
    assert len(named) == 1 and all(named.values())
    assert f"2 ({op}): {named[f'2 ({op})']}" in str(plan)
    assert plan.stages[0].how != "whole" and plan.stages[0].last.partition(".")[0] in ("0", "1", "2")
    assert_same(model, plain)


def test_the_table() -> None:
    _, planned = pair(Flat)
    run(planned, image())
    with pytest.warns(UserWarning, match="gradients"):
        planned(image())
    plan = memsave.patch_plans(planned)[0]
    lines = str(plan).splitlines()
    assert lines[0] == "(the model), stream, called with 1 x 3 x 40 x 40:"
    # 8 * 40 * 40 floats of the first map twice while its norm is computed.
    assert plan.plain_peak_bytes == 2 * 8 * 40 * 40 * 4
    ratio = plan.plain_peak_bytes / plan.peak_bytes
    macs = 8 * 27 * 1600 + 8 * 72 * 400 + 4 * 8 * 400
    assert plan.plain_macs == plan.macs == macs
    assert f"peak 100.0 KiB -> {plan.peak_bytes / 1024:.1f} KiB ({ratio:.1f}x less;" in lines[1]
    assert f"multiply-accumulates {macs:,} (+0.0%)" in lines[1]
    assert lines[2].split() == ["from", "to", "ops", "computed", "peak", "extra", "MACs"]
    assert lines[3].split()[:3] == ["first.conv", "(the", "model)"] and "4 bands of 5 rows" in lines[3]
    assert lines[-1].strip() == "calls so far: 1 planned, 1 plain (gradients are enabled)"


def test_tiles_count_what_they_compute_again() -> None:
    plain, planned = pair(Flat, "patch")
    plan = memsave.patch_plans(planned)[0]
    # 20 x 20 outputs in 3 x 3 tiles of 7, 7 and 6; the stride 2 kernel 3 reads one row more of the first map.
    rows = [(0, 7), (7, 14), (14, 20)]
    read = sum(min(40, 2 * (stop - 1) - 1 + 3) - max(0, 2 * start - 1) for start, stop in rows)
    assert read == 42
    assert plan.macs - plan.plain_macs == 8 * 27 * (read * read - 1600)
    assert plan.stages[0].extra_macs == pytest.approx(plan.macs - plan.plain_macs, rel=0.05)


class Three(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 2, dilation=2))


def test_halos_by_hand() -> None:
    model = lively(nn.Sequential(Three(), nn.AdaptiveAvgPool2d(1)))
    convert(model, "patch")
    plan = memsave.patch_plans(model)[0]
    assert plan.stages[0].how == "3 x 3 tiles"
    prefix = "" if plan.module else "0."
    found = {halo.module.removeprefix(prefix): halo for halo in plan.halos}
    # What one row of the last map reads of the input: 2 + 1 + 4 * 2 rows more than the two that it stands for.
    assert {n: (h.kernel, h.stride, h.halo_rows) for n, h in found.items()} == {
        "0": (3, 1, 2),
        "1": (3, 2, 1),
        "2": (5, 1, 8),
    }
    first, second = 40 * 4 * 27, 20 * 4 * 36 // 2  # multiply-accumulates of each op for one row of the input
    assert {n: h.extra_macs for n, h in found.items()} == {"0": 0, "1": first, "2": 8 * (first + second)}
    lines = plan.redistribution().splitlines()
    assert [line.split()[0].removeprefix(prefix) for line in lines] == ["module", "2", "1", "0"]
    assert lines[1].split()[1:] == ["5", "1", "8", f"{8 * (first + second):,}"]


def test_a_stage_without_windows_has_no_halo() -> None:
    model = lively(nn.Sequential(nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1)))
    convert(model)
    assert memsave.patch_plans(model)[0].halos == ()
    assert memsave.patch_plans(model)[0].redistribution() == "no op with a window runs in parts: there is no halo"


@schedules
def test_a_picture(schedule: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (pip install 'memsave[plot]')")
    from matplotlib.image import imread

    _, planned = pair(Flat, schedule)
    plan = memsave.patch_plans(planned)[0]
    assert plan.plot(tmp_path / "plan.png") == tmp_path / "plan.png"
    pixels = imread(tmp_path / "plan.png")
    assert min(pixels.shape[:2]) > 300
    orange = (abs(pixels[..., :3] * 255 - [0xD5, 0x5E, 0x00]).max(-1) < 40).sum()
    assert orange > 500  # the line of what it takes with the plan


def test_bytes_around_each_op() -> None:
    _, planned = pair(Flat)
    plan = memsave.patch_plans(planned)[0]
    assert [layer.name.split(" ")[0] for layer in plan.layers[:3]] == ["first.conv", "first.norm", "first.act"]
    full = 8 * 40 * 40 * 4
    assert [layer.before_bytes for layer in plan.layers[:2]] == [full, 2 * full]
    assert max(layer.after_bytes for layer in plan.layers) < full
