"""The benchmark runner: no figure without a passed check, and tables in the docs that are those of the result files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import memsave
from benchmarks import run, tables
from benchmarks.cases import CASES, PLAIN, SAMPLED_ALONE, TrainingCase, VarianceCase, Variant, direct

ROOT = Path(__file__).parent.parent


def _add_one_percent(model: nn.Module) -> None:
    model.get_parameter("0.weight").register_hook(lambda grad: 1.01 * grad)


def _wrong_scale(model: nn.Module) -> None:
    SAMPLED_ALONE.apply(model)
    model.get_parameter("2.weight").register_hook(lambda grad: 2.0 * grad)


def tiny_case(*variants: Variant) -> TrainingCase:
    return TrainingCase(
        name="tiny",
        method="wta_crs",
        title="a tiny model",
        model=lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)),
        forward=direct,
        variants=(PLAIN, *variants),
        shape=(2, 256, 32),
    )


def run_tiny(case: TrainingCase | VarianceCase, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(run, "CASES", (case,))
    return run.main(["--repeats", "2", "--threads", str(torch.get_num_threads()), "--out", str(out)])


def test_a_case_gives_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tiny_case(SAMPLED_ALONE)
    assert run_tiny(case, tmp_path, monkeypatch) == 0
    plain, sampled = json.loads((tmp_path / "tiny.json").read_text())["results"]
    model, x = case.model(), torch.randn(case.shape, requires_grad=True)
    assert plain["kept_bytes"] == memsave.saved_bytes(lambda: model(x)) > sampled["kept_bytes"]
    for figures in (plain, sampled):
        weights_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        assert figures["peak_bytes"] > figures["kept_bytes"] + 2 * weights_bytes
    assert 0 < plain["low_s"] <= plain["median_s"] <= plain["high_s"]


@pytest.mark.parametrize("broken", [_add_one_percent, _wrong_scale])
def test_a_case_that_fails_its_check_gives_no_figure(
    broken: Callable[[nn.Module], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = tiny_case(Variant(name="broken", apply=broken))
    assert run_tiny(case, tmp_path, monkeypatch) == 1
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr()
    assert "broken" in printed.err and "MiB" not in printed.out


def test_the_variance_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if isinstance(case, VarianceCase))
    small = replace(case, rows=64, features=8, outputs=8, draws=50, sigmas=(0.0,), keep_ratios=(0.5,))
    assert run_tiny(small, tmp_path, monkeypatch) == 0
    (row,) = json.loads((tmp_path / f"{case.name}.json").read_text())["results"]
    assert row["pps"] < 0.7 * row["crs"]  # half of the rows: the factor is 0.5


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_tables_of_the_docs_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text


def test_every_case_has_a_result_file_for_the_cpu() -> None:
    found = {path.stem for path in (ROOT / "benchmarks" / "results" / "cpu").glob("*.json")}
    assert {case.name for case in CASES} <= found
