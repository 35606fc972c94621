"""Measures the variance of the estimators."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.cases.variance import VarianceCase
from memsave import ops
from memsave.nn.rows import ESTIMATORS, KeepRows


def run_variance_case(case: VarianceCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """E|dW - G|^2 / |G|^2 of every estimator, by norms and ratio. `rounds` has no use here: nothing is timed."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for sigma in case.sigmas:
        x = nn.functional.normalize(torch.randn(case.rows, case.features, generator=generator), dim=1)
        x = x * (sigma * torch.randn(case.rows, 1, generator=generator)).exp()
        signal = nn.functional.normalize(x @ torch.randn(case.features, case.outputs, generator=generator), dim=1)
        noise = nn.functional.normalize(torch.randn(case.rows, case.outputs, generator=generator), dim=1)
        dy = nn.functional.normalize(signal + noise, dim=1)
        x, dy = x.to(device), dy.to(device)
        exact = dy.t() @ x
        for keep_ratio in case.keep_ratios:
            row: dict[str, Any] = {"sigma": sigma, "keep_ratio": keep_ratio}
            for estimator in ESTIMATORS:
                keep, total = KeepRows(keep_ratio, 1, estimator), 0.0
                for draw in range(case.draws):
                    rows, scale = keep.draw(x, torch.tensor(draw, device=device))
                    found = ops.sampled_matmul(dy, ops.gather_rows(x, rows), rows, scale)
                    total += float((found - exact).square().sum())
                row[estimator] = total / case.draws / float(exact.square().sum())
            results.append(row)
    return results, {}
