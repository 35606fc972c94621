"""The cases of `PatchConvConfig`: their figures, what is checked before, the budgets, the table and the plot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from benchmarks import plots, run, tables
from benchmarks.cases import CASES, convolution
from benchmarks.cases.convolution import CONVOLUTION_CASES, WAYS, ConvolutionCase, Way, settled
from benchmarks.cases.models import direct
from benchmarks.checks import CheckFailed
from benchmarks.formats import MIB
from benchmarks.runners import convolution as convolution_runner
from benchmarks.runners.convolution import run_convolution_case, smallest_budget

BY_NAME = {case.name: case for case in CONVOLUTION_CASES}
STREAM = {"schedule": "stream"}
SIDE = 128
SHAPE = (1, 3, SIDE, SIDE)
MAP_BYTES = 16 * SIDE * SIDE * 4


def network() -> nn.Module:
    """Wide maps between narrow ones, which is where parts pay."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return settled(nn.Sequential(*layers, nn.Conv2d(16, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1)))


def tiny_case(*ways: Way, **changed: Any) -> ConvolutionCase:
    fields = {"model": network, "forward": direct, "shape": SHAPE, "ways": (WAYS[0], *ways), **changed}
    return ConvolutionCase(name="tiny", title="a tiny network without gradients, an image", **fields)


def rows_of(case: ConvolutionCase) -> dict[str, dict[str, Any]]:
    rows, left_out = run_convolution_case(case, "cpu", 2)
    assert not left_out
    return {row["way"]: row for row in rows}


def test_a_case_gives_bytes_work_and_times() -> None:
    rows = rows_of(tiny_case(*WAYS[1:]))
    assert list(rows) == [way.name for way in WAYS]
    whole = rows["whole"]
    assert whole["peak_bytes"] == 2 * MAP_BYTES and whole["predicted_bytes"] is None
    assert whole["macs"] == SIDE * SIDE * (9 * (3 * 16 + 16 * 16) + 16 * 8)
    assert whole["difference"] == 0
    for schedule in ("stream", "patch"):
        default, smallest = (rows[f"memsave {schedule}{words}"] for words in ("", ", smallest"))
        assert smallest["peak_bytes"] <= default["peak_bytes"] < whole["peak_bytes"]
        assert smallest["peak_bytes"] == smallest["predicted_bytes"]
        assert 0 <= smallest["difference"] < 1e-5
    assert rows["memsave stream, smallest"]["macs"] == whole["macs"] < rows["memsave patch, smallest"]["macs"]
    assert all(0 < row["low_s"] <= row["median_s"] <= row["high_s"] for row in rows.values())


def test_the_smallest_budget_is_one_that_there_is_a_plan_for() -> None:
    model, settings = network(), {**STREAM, "input_size": SHAPE}
    least = smallest_budget(model, settings)
    assert "forward" not in model.__dict__
    with pytest.raises(memsave.UnsupportedModelError, match=f"at least {least:,}"):
        memsave.convert_model(model, memsave.PatchConvConfig(**settings, budget_bytes=least - 1))
    memsave.convert_model(model, memsave.PatchConvConfig(**settings, budget_bytes=least))
    assert memsave.patch_plans(model)[0].peak_bytes == least


def test_a_budget_that_is_anothers_bytes() -> None:
    def halve(model: Any) -> None:
        model.forward = lambda x: nn.Sequential.forward(model, x[:, :, : SIDE // 2])

    halved = Way(name="halved", prepare=halve, exact=False)
    within = Way(name="within", settings=STREAM, budget="halved")
    rows = rows_of(tiny_case(halved, within))
    assert rows["within"]["peak_bytes"] <= rows["halved"]["peak_bytes"] < rows["whole"]["peak_bytes"]
    assert rows["halved"]["difference"] > 1e-3

    def vanish(model: Any) -> None:
        model.forward = lambda x: x.new_zeros(1, 8, 1, 1)

    nothing = replace(halved, prepare=vanish)
    results, left_out = run_convolution_case(tiny_case(nothing, within), "cpu", 2)
    assert [row["way"] for row in results] == ["whole", "halved"]
    assert left_out.keys() == {"within"} and "budget_bytes: expected at least" in left_out["within"]


def _shift(model: Any) -> None:
    model.register_forward_hook(lambda module, inputs, output: output * 1.0001)


def _watch(model: Any) -> None:
    model[0].register_forward_hook(lambda module, inputs, output: None)


def _hold(model: Any) -> None:
    model.register_forward_pre_hook(lambda module, inputs: torch.cat([inputs[0]] * 2)[:1])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (_shift, "memsave: its output is off by 1.0e-04 of the largest"),
        (_watch, "memsave: its calls did not run by the plan: {'hooks watch a module within': "),
        (_hold, "memsave: a call allocates .* bytes, predicted were "),
    ],
)
def test_what_is_not_as_planned_gives_no_figure(prepare: Any, message: str) -> None:
    case = tiny_case(Way(name="memsave", settings=STREAM, prepare=prepare))
    with pytest.raises(CheckFailed, match=message):
        run_convolution_case(case, "cpu", 2)


def test_a_module_within_is_given_what_was_made_for_it() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + 1)

    rows = rows_of(tiny_case(Way(name="memsave", settings=STREAM), model=lambda: settled(Outer()), planned="inner"))
    assert rows["memsave"]["peak_bytes"] == rows["memsave"]["predicted_bytes"] < rows["whole"]["peak_bytes"]


def test_more_than_the_budget_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    within = Way(name="memsave", settings=STREAM, budget="smallest")
    convert = convolution_runner.convert
    monkeypatch.setattr(convolution_runner, "convert", lambda *args: (convert(*args) or 0) - 1)
    with pytest.raises(CheckFailed, match="memsave: a call allocates .* bytes, its budget is "):
        run_convolution_case(tiny_case(within), "cpu", 2)


def run_tiny(case: ConvolutionCase, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(run, "CASES", (case,))
    threads = str(torch.get_num_threads())
    return run.main(["--tiny", "--repeats", "2", "--threads", threads, "--out", str(out)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patch_conv_mobilenet_v2_224", "patch_conv_vae_64", "patch_conv_vae_128"])
def test_cases_at_toy_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if BY_NAME[name].planned:
        pytest.importorskip("diffusers")
    assert run_tiny(BY_NAME[name], tmp_path, monkeypatch) == 0
    data = json.loads((tmp_path / f"{name}.json").read_text())
    found = [row["way"] for row in data["results"]] + list(data["left_out"])
    assert sorted(found) == sorted(way.name for way in BY_NAME[name].ways)
    for row in data["results"]:
        if row["way"] == "diffusers tiling":
            assert row["difference"] > 1e-3
            assert row["peak_bytes"] < data["results"][0]["peak_bytes"]
    assert len(tables.table(data).splitlines()) == len(data["results"]) + 4


def test_without_diffusers_a_case_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convolution, "find_spec", lambda name: None)
    assert run_tiny(BY_NAME["patch_conv_vae_64"], tmp_path, monkeypatch) == 0
    assert "LEFT OUT: patch_conv_vae_64: diffusers is not installed: pip install" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_tiles_of_diffusers_are_its_own() -> None:
    pytest.importorskip("diffusers")
    vae: Any = convolution.vae()
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 64)


def test_every_case_is_among_all_cases() -> None:
    assert {case.name for case in CASES} >= BY_NAME.keys() and len(BY_NAME) == len(CONVOLUTION_CASES)


def result(ways: dict[str, tuple[float, int, float, float]], name: str = "patch_conv_tiny") -> dict[str, Any]:
    """A result file's content: by way, MiB at the peak, MACs, seconds and the difference."""
    rows = [
        {"way": way, "peak_bytes": peak * MIB, "macs": macs, "median_s": time, "difference": difference}
        for way, (peak, macs, time, difference) in ways.items()
    ]
    case = {"kind": "convolution", "name": name, "title": "a network without gradients, an image of 8 x 8 pixels"}
    machine = {"date": "2026-01-01", "device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    return {"format": 2, "tiny": False, "case": case, "machine": machine, "results": rows, "left_out": {}}


def test_the_table() -> None:
    data = result({"whole": (8, 2 * 10**9, 0.1, 0.0), "memsave patch": (1, 21 * 10**8, 0.05, 1.234e-6)})
    header, _, whole, patch, *_ = tables.table(data).splitlines()
    assert header == "|  | allocated at the peak | multiply-accumulates | time | largest difference |"
    assert whole == "| whole | 8.0 MiB (1.00x) | 2.00G (1.000x) | 100 ms (1.00x) | - |"
    assert patch == "| memsave patch | 1.0 MiB (0.12x) | 2.10G (1.050x) | 50 ms (0.50x) | 1e-06 |"


def test_the_plot(tmp_path: Path) -> None:
    ways = {"whole": (8, 1, 0.1, 0.0), "memsave stream": (2, 1, 0.05, 0.0), "memsave patch": (4, 1, 0.2, 0.0)}
    for name in ("patch_conv_a", "patch_conv_b", "patch_conv_c"):
        path = tmp_path / "results" / "cpu" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result(ways, name)))
    (plot,) = plots.all_plots(tmp_path / "results", tmp_path / "images")
    assert plot.path.name == "cpu-patch_conv.png" and not plot.is_current()
    plot.write()
    assert plot.is_current()
    axes, *_ = plots.draw_convolutions(plot.shown).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["memsave stream", "memsave patch"]
    assert [round(bar.get_width(), 2) for bar in axes.patches] == [0.25, 0.5, 0.5, 2.0]
    assert axes.get_title() == "a network\nan image of 8 x 8 pixels"
