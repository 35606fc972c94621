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
    n, d = x.shape
    wide = statistic_dtype(x.dtype, double)
    rounded = rounded_dtype(x.dtype, None if weight is None else weight.dtype, style) or wide
    y = output_dtype(x.dtype, None if weight is None else weight.dtype, style, double)
    widened = 0 if x.dtype == wide and x.is_contiguous() else wide.itemsize * n * d
    squares = widened + wide.itemsize * n * d + wide.itemsize * n
    xhat = wide.itemsize * n * d
    rounding = xhat + (0 if rounded == wide else rounded.itemsize * n * d)
    scaling = 0
    if weight is not None:
        one_plus = style == Style.ONE_PLUS
        product = wide if one_plus else torch.promote_types(weight.dtype, rounded)
        live = xhat if rounded == wide else rounded.itemsize * n * d
        scale = wide.itemsize * d if one_plus else 0
        scaling = live + product.itemsize * n * d
        scaling = max(scaling + scale, scaling + (0 if product == y else y.itemsize * n * d))
    statistics = wide.itemsize * n
    peak = max(squares, widened + statistics + max(rounding, scaling))
    return peak - statistics - y.itemsize * n * d
