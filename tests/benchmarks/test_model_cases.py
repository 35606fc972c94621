"""What is special to the cases of whole models: compiled code, sampled weights, forward alone, kept bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from benchmarks import plots, tables
from benchmarks.cases import CASES, models
from benchmarks.cases.kept import KeptCase
from benchmarks.cases.training import ForwardCase, StepCase, TrainingCase
from benchmarks.cases.variants import COMPILED, EXACT, PLAIN, Variant
from benchmarks.checks import CheckFailed
from benchmarks.formats import MIB
from benchmarks.result_files import RESULTS
from benchmarks.runners import kept as runners_kept
from benchmarks.runners.forward import run_forward_case
from benchmarks.runners.kept import run_kept_case
from benchmarks.runners.models import allocated_bytes, bytes_of
from benchmarks.runners.steps import opened
from tests.architectures.models import ARCHITECTURES, TINY

BY_NAME = {case.name: case for case in CASES}


class Chain(nn.Module):
    """(..., 32) -> (..., 32); torch.compile leaves torch's own classes, such as nn.Sequential, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh().sigmoid().exp().sin()


def tiny_case(*variants: Variant) -> TrainingCase:
    return TrainingCase(
        name="tiny",
        title="a tiny model",
        model=lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        forward=models.direct,
        variants=variants,
        shape=(2, 16, 32),
    )


def test_what_the_profiler_counts_is_what_measure_counts() -> None:
    case = BY_NAME["step_demo"].at_toy_size()
    assert isinstance(case, StepCase)
    with opened(case, PLAIN, "cpu") as step:
        step.run()
        measured = memsave.measure(step.run)
        assert allocated_bytes(step.run, "cpu") == measured.peak_bytes - measured.baseline_bytes


@pytest.mark.slow
def test_compiled_code_has_a_peak_of_its_own() -> None:
    """The compiler fuses elementwise operators, which keep one tensor each otherwise; the settings are put back."""
    settings = torch._functorch.config
    case = replace(tiny_case(PLAIN), model=Chain, shape=(2, 256, 32))
    plain, compiled = (bytes_of(case, variant, "cpu") for variant in (PLAIN, COMPILED))
    assert compiled["kept_bytes"] is None and compiled["allocator_peak_bytes"] is None
    assert plain["peak_bytes"] > 1.3 * compiled["peak_bytes"] > 0  # type: ignore[operator]
    assert settings.activation_memory_budget == 1.0
    with opened(tiny_case(COMPILED), COMPILED, "cpu"):
        assert settings.activation_memory_budget == 0.5


def test_every_linear_inside_of_what_samples_counts_as_sampled() -> None:
    def sample(model: nn.Module) -> None:
        block = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
        block._memsave = {
            "recompute_mlp": memsave.RecomputeMLPConfig(recompute="all", keep_ratio=0.3, target_modules=r".*")
        }  # type: ignore[assignment]
        model.append(block)  # type: ignore[operator]
        model.append(nn.Linear(32, 32))  # type: ignore[operator]

    with opened(tiny_case(PLAIN), Variant(name="sampled", apply=sample), "cpu") as step:
        assert step.sampled() == {"3.0.weight", "3.1.weight"}
    with opened(tiny_case(PLAIN), EXACT, "cpu") as step:
        assert step.sampled() == set()


def forward_case(*variants: Variant) -> ForwardCase:
    case = BY_NAME["forward_llama_blocks"].at_toy_size()
    assert isinstance(case, ForwardCase)
    return replace(case, variants=(PLAIN, *variants))


def test_forward_without_gradients_counts_what_is_temporary() -> None:
    def copy_everything(model: Any) -> None:
        model.norm.register_forward_hook(lambda module, inputs, output: torch.cat([output] * 100)[: len(output)])

    case = forward_case(Variant(name="wasteful", apply=copy_everything))
    (plain, wasteful), _ = run_forward_case(case, "cpu", 2)
    batch, tokens = case.shape
    hidden_bytes = batch * tokens * 64 * 4
    assert 4 * hidden_bytes < plain["temporary_bytes"] < 40 * hidden_bytes
    assert wasteful["temporary_bytes"] > 100 * hidden_bytes
    assert 0 < plain["low_s"] <= plain["median_s"]


def test_a_forward_that_differs_gives_no_figure() -> None:
    def wrong(model: Any) -> None:
        model.norm.register_forward_hook(lambda module, inputs, output: 1.001 * output)

    with pytest.raises(CheckFailed, match="wrong: its result for output has .* the plain model's error"):
        run_forward_case(forward_case(Variant(name="wrong", apply=wrong)), "cpu", 2)


def test_kept_bytes_are_those_of_the_model() -> None:
    case = BY_NAME["kept"].at_toy_size()
    assert isinstance(case, KeptCase)
    case = replace(case, architectures=tuple(a for a in ARCHITECTURES if a.name in ("BERT", "ViT")))
    results, _ = run_kept_case(case, "cpu", 2)
    assert [(r["architecture"], r["dtype"], r["dropout"]) for r in results] == [
        *(("BERT", dtype, 0.1) for dtype in ("float32", "bfloat16")),
        *(("ViT", dtype, 0.0) for dtype in ("float32", "bfloat16")),
    ]
    (bert,) = (a for a in ARCHITECTURES if a.name == "BERT")
    model: Any = bert.make(TINY, dropout=0.1)
    batch = bert.batch(TINY, "right")
    assert results[0]["plain_bytes"] == memsave.saved_bytes(lambda: model(**batch).loss) > results[0]["converted_bytes"]


def test_an_architecture_that_computes_something_else_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(model: Any) -> None:
        model.lm_head.weight.register_hook(lambda grad: 1.001 * grad)

    monkeypatch.setattr(runners_kept.memsave, "convert_model", convert)
    case = replace(BY_NAME["kept"].at_toy_size(), architectures=ARCHITECTURES[:1])
    with pytest.raises(CheckFailed, match="Llama, converted: .*the plain model's"):
        run_kept_case(case, "cpu", 2)  # type: ignore[arg-type]


def test_the_table_of_kept_bytes() -> None:
    rows = [
        {"architecture": name, "dtype": dtype, "dropout": dropout, "plain_bytes": 4 * size, "converted_bytes": size}
        for name, dropout in (("BERT", 0.1), ("ViT", 0.0))
        for dtype, size in (("float32", 2**20), ("bfloat16", 2**19))
    ]
    header, bert, vit = tables.kept_rows({"results": rows})
    assert header == [
        "architecture",
        *("float32: plain", "converted", "ratio", "bfloat16: plain", "converted", "ratio"),
    ]
    assert bert == ["BERT, dropout 0.1", "4.0 MiB", "1.0 MiB", "0.25x", "2.0 MiB", "0.5 MiB", "0.25x"]
    assert vit[0] == "ViT"


def test_the_points_of_a_step_and_the_line_of_the_best() -> None:
    """On a GPU by the allocator's peak, which compiled code has, too."""
    data = json.loads((RESULTS / "cpu" / "step_demo.json").read_text())
    points = {"plain": (4, 1.0), "slow": (4, 2.0), "memsave": (2, 1.5), "compiled": (None, 3.0)}
    data["results"] = [
        {"variant": name, "peak_bytes": peak and peak * MIB, "allocator_peak_bytes": None, "median_s": seconds}
        for name, (peak, seconds) in points.items()
    ]
    data["results"][-1]["allocator_peak_bytes"] = MIB
    (axes,) = plots.draw_pareto([data]).axes
    *dots, line = axes.lines
    drawn = sorted((float(x), float(y)) for dot in dots for x, y in dot.get_xydata())
    assert drawn == [(1, 3000), (2, 1500), (4, 1000), (4, 2000)]
    assert [tuple(map(float, point)) for point in line.get_xydata()] == [(1, 3000), (2, 1500), (4, 1000)]
    names = [text.get_text() for text in axes.get_legend().get_texts()]
    assert names == ["1  compiled", "2  memsave", "3  plain", "4  slow"]
    assert [(text.get_text().strip(), *map(float, text.xy)) for text in axes.texts][:2] == [
        ("1", 1, 3000),
        ("2", 2, 1500),
    ]
