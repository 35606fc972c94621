"""Triton kernel of `rms_norm`: one row for each program, read once.

Shapes: x (N, D), weight (D,) or None, results y (N, D) and rstd (N,). A program holds a whole row, up to 16,384
features in registers alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import TRITON_DTYPES, tile
from .style import Style, output_dtype, rounded_dtype, statistic_dtype

ONE_PLUS = tl.constexpr(int(Style.ONE_PLUS))


@triton.jit
def forward_kernel(
    x,
    weight,
    y,
    rstd,
    D,
    stride_n,
    stride_d,
    stride_w,
    STYLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRODUCT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = weight * xhat of one row. The types: of the statistic, of xhat before it is scaled, of the product.

    EPS is a constant, because a float argument would be rounded to float32.
    """
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide = tl.load(x + r * stride_n + d.to(tl.int64) * stride_d, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
    root = 1.0 / tl.sqrt(tl.sum(wide * wide) / D + tl.full([], EPS, WIDE))
    tl.store(rstd + r, root)
    values = (wide * root).to(ROUNDED).to(PRODUCT)
    if HAS_WEIGHT:
        scale = tl.load(weight + d * stride_w, mask=inside, other=0.0)
        scale = scale.to(WIDE) + 1.0 if STYLE == ONE_PLUS else scale
        values = scale.to(PRODUCT) * values
    tl.store(y + r * D + d, values.to(y.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: int, double: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` on a GPU: x (N, D), weight (D,) or None -> y (N, D), rstd (N,)."""
    n, features = x.shape
    weight_dtype = None if weight is None else weight.dtype
    y = torch.empty(x.shape, dtype=output_dtype(x.dtype, weight_dtype, style, double), device=x.device)
    wide = statistic_dtype(x.dtype, double)
    rstd = torch.full((n,), float("nan"), dtype=wide, device=x.device) if features == 0 else x.new_empty(n, dtype=wide)
    if y.numel() == 0:  # without features, the mean of nothing
        return y, rstd
    block, warps = tile(features)
    rounded = rounded_dtype(x.dtype, weight_dtype, style) or wide
    product = torch.promote_types(wide if weight_dtype is None or style == Style.ONE_PLUS else weight_dtype, rounded)
    product = torch.promote_types(product, torch.float32)  # half types multiply in float32
    with torch.cuda.device_of(x):
        forward_kernel[(n,)](
            x,
            weight,
            y,
            rstd,
            features,
            *x.stride(),
            0 if weight is None else weight.stride(0),
            STYLE=style,
            HAS_WEIGHT=weight is not None,
            EPS=eps,
            WIDE=TRITON_DTYPES[wide],
            ROUNDED=TRITON_DTYPES[rounded],
            PRODUCT=TRITON_DTYPES[product],
            BLOCK=block,
            num_warps=warps,
        )
    return y, rstd


def workspace_bytes(x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: int, double: bool) -> int:
    return 0
