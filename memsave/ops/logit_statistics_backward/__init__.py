"""Turns logits into their own gradient, in place, from the gradients of what `logit_statistics` found in them.

C rows, V classes, z = logits, or softcap * tanh(logits / softcap).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..logit_statistics import check_softcap, statistic_dtype
from . import reference


def _fake(*_: object) -> None:
    return None


_op = register(
    "logit_statistics_backward(Tensor(a!) logits, Tensor target, Tensor peak, Tensor log_sum, "
    "Tensor d_lse, Tensor d_target, Tensor d_total, float? softcap) -> ()",
    fake=_fake,
    reference=reference,
    kernels=("native", "triton"),
)


def logit_statistics_backward(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_lse: Tensor,
    d_target: Tensor,
    d_total: Tensor,
    softcap: float | None = None,
) -> None:
    """Writes d_lse * softmax(z) + d_target * [class = target] + d_total, times dz / dlogits, over the logits.

    Computed in float32 (float64 for float64 logits) and rounded once.

    Args:
        logits: (C, V) floating point, any strides, each element in a place of its own.
        target: (C,) int64. One outside of [0, V) is a class that is not here.
        peak, log_sum: (C,) float32 (float64 for float64 logits); softmax(z) is e^(z - peak - log_sum). They need not
            come from these logits alone: where several processes hold classes, they are those of all classes.
        d_lse, d_target, d_total: (C,) in the same dtype: the gradients of logsumexp, of the target's z and of the
            sum of z.
        softcap: as for `logit_statistics`.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, a softcap of 0 or less.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("logits", logits, 2)
    _check.typed("target", target, torch.int64, 1)
    numbers = {"peak": peak, "log_sum": log_sum, "d_lse": d_lse, "d_target": d_target, "d_total": d_total}
    for name, tensor in numbers.items():
        _check.typed(name, tensor, statistic_dtype(logits.dtype), 1)
    for name, tensor in {"target": target, **numbers}.items():
        _check.length(name, tensor, logits.shape[0], "rows of logits")
    _check.same_device(logits=logits, target=target, **numbers)
    check_softcap(softcap)
    _op(logits, target, peak, log_sum, d_lse, d_target, d_total, softcap)
