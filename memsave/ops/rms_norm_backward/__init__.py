"""The gradients of RMSNorm from its input and one statistic per row.

N rows, D features. xhat = x * rstd, dxhat = dy * weight: dx = rstd * (dxhat - xhat * mean(dxhat * xhat)) over each row,
dweight = sum over the rows of dy * xhat.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..rms_norm import check_weight
from . import reference


def _fake(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None or not needs_dweight else weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight


_op = register(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, int style, bool needs_dweight)"
    " -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    kernels=("native", "triton"),
)


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool = True
) -> tuple[Tensor, Tensor]:
    """dx and dweight, computed in the dtype of rstd and rounded once. The same bits at any number of threads.

    Args:
        dy: (N, D) floating point, any strides: the gradient of y.
        x: (N, D) floating point, any strides: the input of `rms_norm`.
        rstd: (N,) float32 or float64: what `rms_norm` returned beside y.
        weight: (D,) floating point, or None.
        style: as for `rms_norm`.
        needs_dweight: whether dweight is computed.

    Returns:
        dx: (N, D), contiguous, dtype of x.
        dweight: (D,), dtype of the weight; of shape (0,) and the dtype of x without a weight, or where not needed.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, an unknown style.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.normalized(dy, x, rstd)
    check_weight(x, weight, style)
    _check.same_device(dy=dy, x=x, rstd=rstd, weight=weight)
    return _op(dy, x, rstd, weight, int(style), needs_dweight)
