"""The cases of `RoutedFFNConfig`: their figures, what is checked before, and the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import run, tables
from benchmarks.cases import CASES
from benchmarks.cases.routed_ffn import ROUTED_FFN_CASES, ROUTED_WAYS, RoutedFFNCase
from benchmarks.checks import CheckFailed
from benchmarks.runners import routed_ffn as runner
from benchmarks.runners.routed_ffn import run_routed_ffn_case
from memsave.nn.routed_ffn import RoutedFFN

PLAIN, GATED, _ = ROUTED_FFN_CASES


def tiny(case: RoutedFFNCase = PLAIN, **changed: Any) -> RoutedFFNCase:
    return replace(case.at_toy_size(), **changed)


@pytest.mark.parametrize("case", [PLAIN, GATED], ids=["plain", "gated"])
def test_a_case_gives_bytes_work_and_times(case: RoutedFFNCase) -> None:
    results, left_out = run_routed_ffn_case(tiny(case), "cpu", 2)
    rows = {row["way"]: row for row in results}
    assert not left_out and list(rows) == [way.name for way in ROUTED_WAYS]
    n, d, f = 64, 16, 64
    linears = 2 if case is PLAIN else 3
    # Besides x: what the activation and the last linear read, and for a gated block the product's factors.
    assert rows["dense"]["kept_bytes"] == 4 * n * (d + (2 if case is PLAIN else 4) * f)
    assert rows["dense, checkpointed"]["kept_bytes"] == 4 * n * d
    assert rows["dense"]["macs"] == 3 * linears * n * d * f
    # Checkpointing does not run the last linear again: nothing after it is needed.
    assert rows["dense, checkpointed"]["macs"] == (4 * linears - 1) * n * d * f
    for active in (1, 2, 4):
        row = rows[f"memsave, {active} of 4"]
        assert row["kept_bytes"] == 4 * n * (d + (linears - 1) * f * active // 4 + 4 + active) + 16
        assert row["macs"] == 3 * (linears * n * d * f * active // 4 + n * d * 4)
        assert row["error"] <= 2
    assert rows["memsave, 1 of 4"]["peak_bytes"] < rows["memsave, 2 of 4"]["peak_bytes"]
    assert all(0 < row["low_s"] <= row["median_s"] <= row["high_s"] for row in results)


def test_the_ways_share_their_weights() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    steps = [runner.BlockStep(way, dense, torch.zeros(2, 4), torch.zeros(2, 4)) for way in ROUTED_WAYS]
    assert all({id(p) for p in dense.parameters()} <= {id(p) for p in step.block.parameters()} for step in steps)
    assert [type(m) for m in dense] == [nn.Linear, nn.GELU, nn.Linear]


def test_a_block_that_differs_from_its_reference_gets_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: RoutedFFN, x: Tensor) -> Tensor:
        return 1.001 * routed(self, x)

    routed = RoutedFFN._routed
    monkeypatch.setattr(RoutedFFN, "_routed", wrong)
    with pytest.raises(CheckFailed, match=r"memsave, 1 of 4: its result for [\w.]+ has .*x the plain model's error"):
        run_routed_ffn_case(tiny(), "cpu", 2)


def test_bytes_that_are_not_as_stated_give_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoutedFFN, "kept_bytes", lambda *_: 1)
    with pytest.raises(CheckFailed, match="memsave, 1 of 4: it keeps .* bytes, stated are 1"):
        run_routed_ffn_case(tiny(), "cpu", 2)


def test_the_cases_are_wired() -> None:
    assert {case.name for case in ROUTED_FFN_CASES} <= {case.name for case in CASES}
    assert run.RUNNERS[RoutedFFNCase] is run_routed_ffn_case
    for case in ROUTED_FFN_CASES:
        assert all(f"{size}" in case.title for size in (case.tokens, case.width, case.hidden))


def test_the_table() -> None:
    results = [
        {"way": "dense", "kept_bytes": 2**22, "peak_bytes": 2**23, "macs": 10**9, "median_s": 0.2, "cpu_s": 0.2},
        {"way": "memsave", "kept_bytes": 2**21, "peak_bytes": 2**22, "macs": 5 * 10**8, "median_s": 0.1, "cpu_s": 0.12},
    ]
    machine = {"device": "cpu", "cpu": "some CPU", "threads": 1, "versions": {"torch": "2.13"}, "date": "today"}
    header, _, first, second, *_, footnote = tables.table(
        {"case": tiny().describe(), "machine": machine, "results": results}
    ).splitlines()
    assert header == (
        "|  | kept for backward | allocated at the peak | multiply-accumulates | time | CPU time |"
    )  # fmt: skip
    assert first == "| dense | 4.0 MiB (1.00x) | 8.0 MiB (1.00x) | 1.0G (1.00x) | 200 ms (1.00x) | 1.00x |"
    assert second == "| memsave | 2.0 MiB (0.50x) | 4.0 MiB (0.50x) | 0.5G (0.50x) | 100 ms (0.50x) | 0.60x |"
    assert footnote.startswith("A feed-forward block with GELU, d = 1024") and "some CPU, 1 thread" in footnote
