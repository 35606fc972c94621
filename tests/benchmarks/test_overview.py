"""The README's table of methods: every method has a line, and its figures are those of the result files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overview
from benchmarks.checks import CheckFailed, check_own
from benchmarks.result_files import RESULTS, ResultError
from memsave.config import Guarantee
from memsave.methods import METHODS

ENTRY = overview.Entry(
    method="m",
    config="C()",
    guarantee="exact",
    keeps="little",
    case="case",
    where="here",
    ours="mine",
    peer="theirs",
    not_when="never",
)


def test_every_method_has_a_line() -> None:
    promised = {entry.method: entry.guarantee for entry in overview.ENTRIES}
    assert promised.keys() == {method.name for method in METHODS} | {"shira", "lamda"}
    for method in METHODS:
        assert promised[method.name] == str(method.guarantee)
    assert promised["shira"] == promised["lamda"] == str(Guarantee.ADAPTER)


def test_figures_are_ratios_of_the_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data: dict[str, Any] = json.loads((RESULTS / "cpu" / "step_demo.json").read_text())
    data["results"] = [
        {"variant": "plain", "kept_bytes": 100, "peak_bytes": 200, "median_s": 2.0},
        {"variant": "mine", "kept_bytes": 25, "peak_bytes": 100, "median_s": 3.0},
        {"variant": "theirs", "kept_bytes": None, "peak_bytes": 50, "median_s": 1.0},
    ]
    (tmp_path / "case.json").write_text(json.dumps(data))
    monkeypatch.setattr(overview, "ENTRIES", (ENTRY,))
    (row,) = (line for line in overview.overview(tmp_path).splitlines() if "docs/m.md" in line and "|" in line)
    assert "| 0.25x | 0.50x | 1.50x | theirs: -, 0.25x, 0.50x |" in row
    data["results"].pop()
    (tmp_path / "case.json").write_text(json.dumps(data))
    with pytest.raises(ResultError, match="case: no figures of theirs"):
        overview.overview(tmp_path)


def test_gradients_of_ones_own_function_are_compared_with_plain_pytorch() -> None:
    right = {"a": torch.ones(3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    assert check_own("v", {name: g.clone() for name, g in right.items()}, right) == 0
    for wrong in (
        {"a": right["a"] * 1.01, "b": right["b"]},
        {"a": right["a"], "b": right["b"] + 1},
        {"a": right["a"]},
        {},
    ):
        with pytest.raises(CheckFailed, match="^v: "):
            check_own("v", wrong, right)
