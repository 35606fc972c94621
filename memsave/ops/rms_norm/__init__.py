"""RMSNorm over the rows of a matrix, in each of the styles that models use.

N rows, D features. xhat = x * rstd, rstd = 1 / sqrt(mean(x^2) + eps). Zhang and Sennrich 2019, arXiv 1910.07467.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference
from .style import Style, output_dtype, statistic_dtype

__all__ = ["Style", "check_weight", "rms_norm"]


def _fake(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> tuple[Tensor, Tensor]:
    dtype = output_dtype(x.dtype, None if weight is None else weight.dtype, style, double)
    rstd = x.new_empty(x.shape[:1], dtype=statistic_dtype(x.dtype, double))
    return x.new_empty(x.shape, dtype=dtype), rstd


_op = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, int style, bool double) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    kernels=("native", "triton"),
)


def check_weight(x: Tensor, weight: Tensor | None, style: int) -> None:
    """Raises ValueError for an unknown style, and a weight that does not fit x (N, D)."""
    if style not in list(Style):
        raise ValueError(f"style must be one of {', '.join(f'{s.name} ({s:d})' for s in Style)}; got {style!r}.")
    if weight is not None:
        _check.floating("weight", weight, 1)
        _check.length("weight", weight, x.shape[1], "features of x")


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float | None, style: int, double: bool = False
) -> tuple[Tensor, Tensor]:
    """y = weight * xhat, rounded as `style` says, and rstd.

    Args:
        x: (N, D) floating point, any strides.
        weight: (D,) floating point, or None for xhat in the dtype of x.
        eps: added to the mean square; None is the machine epsilon of the statistic's dtype.
        style: a `Style`: where values are rounded, and whether the weight counts from one.
        double: for float64 x, compute in float64. All else is computed in float32.

    Returns:
        y: (N, D), contiguous. Its dtype is what the style's own casts and products give in plain PyTorch.
        rstd: (N,) float32, or float64 as said.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, an unknown style.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    check_weight(x, weight, style)
    _check.same_device(x=x, weight=weight)
    if eps is None:
        eps = torch.finfo(statistic_dtype(x.dtype, double)).eps
    return _op(x, weight, eps, int(style), double)
