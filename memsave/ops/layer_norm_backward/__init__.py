"""The gradients of LayerNorm from its input and one statistic per row.

N rows, D features. xhat = (x - mean) * rstd, dxhat = dy * weight: dx = rstd * (dxhat - mean(dxhat) - xhat *
mean(dxhat * xhat)) over each row; over the rows, dweight = sum of dy * xhat, dbias = sum of dy.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from . import reference


def _fake(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dweight, dbias = (rstd.new_empty(x.shape[1] if needed else 0) for needed in (needs_dweight, needs_dbias))
    return x.new_empty(x.shape), dweight, dbias


_op = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor? weight, bool needs_dweight, bool needs_dbias)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    kernels=("native", "triton"),
)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_dweight: bool = True,
    needs_dbias: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias, computed in the dtype of rstd. The mean of each row is taken from x again.

    Args:
        dy: (N, D) floating point, any strides: the gradient of y.
        x: (N, D) floating point, any strides: the input of `layer_norm`.
        rstd: (N,) float32 or float64: what `layer_norm` returned beside y.
        weight: (D,) floating point, or None.
        needs_dweight: whether dweight is computed.
        needs_dbias: whether dbias is computed.

    Returns:
        dx: (N, D), contiguous, dtype of x.
        dweight: (D,), dtype of rstd, not rounded to that of the weight; of shape (0,) where not needed.
        dbias: the same of the bias.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.normalized(dy, x, rstd)
    if weight is not None:
        _check.floating("weight", weight, 1)
        _check.length("weight", weight, x.shape[1], "features of x")
    _check.same_device(dy=dy, x=x, rstd=rstd, weight=weight)
    return _op(dy, x, rstd, weight, needs_dweight, needs_dbias)
