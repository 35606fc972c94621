"""Rows of `logit_statistics_backward`: float64 and the error of plain PyTorch bound the error.

C rows, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from . import logit_statistics
from .inputs import FLOATS, matrix, short, strided
from .logit_statistics import longer, one_hot, targets


def oracle(logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """(C, V), (C,), five times (C,) -> (C, V), float64, in more than float64 where numpy has it."""
    z, slope, (*numbers, softcap) = longer(logits), 1, rest
    if softcap is not None:
        tanh = numpy.tanh(z / softcap)
        z, slope = softcap * tanh, 1 - tanh**2
    peak, log_sum, d_lse, d_target, d_total = (longer(t)[:, None] for t in numbers)
    gradient = numpy.exp(z - peak - log_sum) * d_lse + one_hot(logits, target).numpy() * d_target + d_total
    return torch.from_numpy((gradient * slope).astype(float))


def plain(logits: Tensor, target: Tensor, *rest: Any) -> Tensor:
    """The same in the dtype of the statistics, rounded at the end."""
    z, slope, (*numbers, softcap) = logits.to(rest[0].dtype), torch.ones(()), rest
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = softcap * tanh, 1 - tanh.square()
    peak, log_sum, d_lse, d_target, d_total = (t[:, None] for t in numbers)
    gradient = (z - peak - log_sum).exp() * d_lse + one_hot(logits, target) * d_target + d_total
    return (gradient * slope).to(logits.dtype)


SPEC = OpSpec("logit_statistics_backward", oracle, plain, exact=False, writes=(0,))


def arguments(
    n: int, classes: int, dtype: torch.dtype, softcap: float | None = None, scale: float = 1.0
) -> Callable[[], tuple[Any, ...]]:
    """`make` for logits (n, classes) of a standard deviation of `scale`, and what (n,) belongs to them."""

    def make() -> tuple[Any, ...]:
        logits = matrix(n, classes, value=n).mul(scale).to(dtype)
        return with_numbers(logits, softcap)

    return make


def with_numbers(logits: Tensor, softcap: float | None = None) -> tuple[Any, ...]:
    """The statistics of the logits and random gradients of them."""
    n, classes = logits.shape
    target = targets(n, classes)
    some = logits if classes else logits.new_zeros(n, 1)
    peak, log_sum, *_ = logit_statistics.plain(some, target, softcap)
    gradients = (matrix(1, n, peak.dtype, value=value)[0] for value in (2, 3, 4))
    return logits, target, peak, log_sum, *gradients, softcap


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    rows = {
        "odd": arguments(37, 19, dtype),
        "even": arguments(64, 128, dtype),
        "one_class": arguments(7, 1, dtype),
        "no_rows": arguments(0, 5, dtype),
        "no_classes": arguments(3, 0, dtype),
        "wide_range": arguments(11, 301, dtype, scale=60.0),
        "softcap": arguments(21, 77, dtype, softcap=1.5),
        "loose_softcap": arguments(21, 77, dtype, softcap=50.0),
    }
    cases = [OpCase(SPEC, f"{name}_{short(dtype)}", make) for name, make in rows.items()]
    return [*cases, OpCase(SPEC, f"long_{short(dtype)}", arguments(5, 5001, dtype), large=True)]


def _strided() -> tuple[Any, ...]:
    *tensors, softcap = arguments(9, 33, torch.float32)()
    return *(strided(t) for t in tensors), softcap


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "transposed", lambda: with_numbers(matrix(33, 9).t(), 2.0)),
    OpCase(SPEC, "narrow", lambda: with_numbers(matrix(9, 40)[:, 3:30])),
]
