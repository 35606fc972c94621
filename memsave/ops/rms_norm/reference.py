"""Plain PyTorch implementation of `rms_norm`.

N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .style import Style, output_dtype, rounded_dtype, statistic_dtype


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> tuple[Tensor, Tensor]:
    wide = x.contiguous().to(statistic_dtype(x.dtype, double))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (N, 1)
    xhat = wide * rstd
    if rounded := rounded_dtype(x.dtype, None if weight is None else weight.dtype, style):
        xhat = xhat.to(rounded)
    if weight is None:
        return xhat, rstd.squeeze(-1)
    y = (1.0 + weight.to(wide.dtype) if style == Style.ONE_PLUS else weight) * xhat
    return (y.to(x.dtype) if style in (Style.SCALE_THEN_CAST, Style.ONE_PLUS) else y), rstd.squeeze(-1)


def workspace_bytes(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> int:
    """The largest of three moments: the squares and their means, xhat being rounded, and the product being made."""
    n, d = x.shape
    wide, weight_dtype = statistic_dtype(x.dtype, double), None if weight is None else weight.dtype
    rounded = rounded_dtype(x.dtype, weight_dtype, style) or wide
    y = output_dtype(x.dtype, weight_dtype, style, double)
    statistic = wide.itemsize * n
    widened = 0 if x.dtype == wide and x.is_contiguous() else wide.itemsize * n * d
    squares = wide.itemsize * n * d + statistic
    rounding = statistic + (wide.itemsize + (0 if rounded == wide else rounded.itemsize)) * n * d
    scaling = 0 if weight is None else statistic + _scaling_bytes(x, weight, wide, rounded, y, style)
    return widened + max(squares, rounding, scaling) - statistic - y.itemsize * n * d


def _scaling_bytes(
    x: Tensor, weight: Tensor, wide: torch.dtype, rounded: torch.dtype, y: torch.dtype, style: int
) -> int:
    """xhat, the weight as it is used, their product, and either what torch casts on the CPU to multiply or y."""
    n, d = x.shape
    used = wide if style == Style.ONE_PLUS else weight.dtype
    product = torch.promote_types(used, rounded)
    casts = (0 if rounded == product else n * d) + (0 if used == product else d)
    multiplying = product.itemsize * (casts if x.device.type == "cpu" else 0)
    rounding = 0 if product == y else y.itemsize * n * d
    scale = wide.itemsize * d if style == Style.ONE_PLUS else 0
    return (rounded.itemsize + product.itemsize) * n * d + max(multiplying + scale, rounding)
