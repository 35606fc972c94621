"""Rows of `logit_statistics`: float64 and the error of plain PyTorch bound the error.

C rows, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, short, strided

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def oracle(logits: Tensor, target: Tensor, softcap: float | None) -> Statistics:
    """(C, V), (C,) -> four times (C,), float64, in more than float64 where numpy has it."""
    z = longer(logits)
    if softcap is not None:
        z = softcap * numpy.tanh(z / softcap)
    peak = z.max(1, initial=-numpy.inf)
    log_sum = numpy.log(numpy.exp(z - peak[:, None]).sum(1))
    at_target = (z * one_hot(logits, target).numpy()).sum(1)
    peak, log_sum, at_target, total = (torch.from_numpy(t.astype(float)) for t in (peak, log_sum, at_target, z.sum(1)))
    return peak, log_sum, at_target, total


def longer(tensor: Tensor) -> Any:
    return tensor.double().numpy().astype(numpy.longdouble)


def one_hot(logits: Tensor, target: Tensor) -> Tensor:
    """(C, V) bool."""
    return torch.arange(logits.shape[1]) == target[:, None]


def plain(logits: Tensor, target: Tensor, softcap: float | None) -> Statistics:
    """The same in the dtype of the results."""
    z = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    peak = z.amax(1)
    log_sum = (z - peak[:, None]).exp().sum(1).log()
    return peak, log_sum, (z * one_hot(logits, target)).sum(1), z.sum(1)


SPEC = OpSpec("logit_statistics", oracle, plain, exact=False)


def targets(n: int, classes: int) -> Tensor:
    """(n,) int64: classes, and in every fifth row none of them."""
    found = torch.randint(max(classes, 1), (n,), generator=torch.Generator().manual_seed(n))
    found[::5] = torch.tensor([-1, classes, -(2**62), 2**62])[torch.arange(len(found[::5])) % 4]
    return found


def arguments(
    n: int, classes: int, dtype: torch.dtype, softcap: float | None = None, scale: float = 1.0
) -> Callable[[], tuple[Any, ...]]:
    """`make` for logits (n, classes) of a standard deviation of `scale`, and targets (n,)."""

    def make() -> tuple[Any, ...]:
        return matrix(n, classes, value=n).mul(scale).to(dtype), targets(n, classes), softcap

    return make


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    rows = {
        "odd": arguments(37, 19, dtype),
        "even": arguments(64, 128, dtype),
        "one_class": arguments(7, 1, dtype),
        "no_rows": arguments(0, 5, dtype),
        "wide_range": arguments(11, 301, dtype, scale=60.0),
        "softcap": arguments(21, 77, dtype, softcap=1.5),
        "loose_softcap": arguments(21, 77, dtype, softcap=50.0),
    }
    cases = [OpCase(SPEC, f"{name}_{short(dtype)}", make) for name, make in rows.items()]
    # Several blocks of a row, each with larger logits than the one before.
    return [*cases, OpCase(SPEC, f"long_{short(dtype)}", lambda: _rising(dtype), large=True)]


def _rising(dtype: torch.dtype) -> tuple[Any, ...]:
    logits = matrix(5, 5001) + torch.linspace(0, 40, 5001)
    return logits.to(dtype), targets(5, 5001), None


def _strided() -> tuple[Any, ...]:
    logits, target, softcap = arguments(9, 33, torch.float32)()
    return strided(logits), strided(target), softcap


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "transposed", lambda: (matrix(33, 9).t(), targets(9, 33), None)),
    OpCase(SPEC, "expanded", lambda: (matrix(1, 21).expand(6, 21), targets(6, 21), None)),
]
