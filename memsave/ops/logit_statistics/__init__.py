"""What cross entropy needs of each row of logits.

C rows, V classes, z = logits, or softcap * tanh(logits / softcap). The sum of e^z over a row is e^(peak + log_sum).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference
from .reference import statistic_dtype

__all__ = ["check_softcap", "logit_statistics", "statistic_dtype"]

Statistics = tuple[Tensor, Tensor, Tensor, Tensor]


def _fake(logits: Tensor, target: Tensor, softcap: float | None) -> Statistics:
    peak, log_sum, at_target, total = (
        logits.new_empty(logits.shape[:1], dtype=statistic_dtype(logits.dtype)) for _ in range(4)
    )
    return peak, log_sum, at_target, total


_op = register(
    "logit_statistics(Tensor logits, Tensor target, float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    kernels=("native", "triton"),
)


def check_softcap(softcap: float | None) -> None:
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for none; got {softcap}.")


def logit_statistics(logits: Tensor, target: Tensor, softcap: float | None = None) -> Statistics:
    """Four numbers of each row, read once, computed in float32 (float64 for float64 logits).

    Args:
        logits: (C, V) floating point, any strides.
        target: (C,) int64. One outside of [0, V) is a class that is not here.
        softcap: bound of |z|, above 0; None for none.

    Returns:
        peak: (C,) the largest z; 0 where that is infinite, or V is 0.
        log_sum: (C,) the logarithm of the sum of e^(z - peak). Where a z is NaN, peak + log_sum is NaN.
        at_target: (C,) z of the target; 0 where it is not here.
        total: (C,) the sum of z.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, a softcap of 0 or less.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("logits", logits, 2)
    _check.typed("target", target, torch.int64, 1)
    _check.length("target", target, logits.shape[0], "rows of logits")
    _check.same_device(logits=logits, target=target)
    check_softcap(softcap)
    return _op(logits, target, softcap)
