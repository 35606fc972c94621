"""Triton kernel of `layer_norm`: one row for each program, read once.

Shapes: x (N, D), weight and bias (D,) or None, results y (N, D) and rstd (N,). A program holds a whole row, up to
16,384 features in registers alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rms_norm.style import statistic_dtype
from ..triton_rows import TRITON_DTYPES, tile


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    y,
    rstd,
    D,
    stride_n,
    stride_d,
    stride_w,
    stride_b,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = xhat * weight + bias of one row, in WIDE. EPS is a constant: a float argument would be rounded to float32."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide = tl.load(x + r * stride_n + d.to(tl.int64) * stride_d, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
    values = tl.where(inside, wide - tl.sum(wide) / D, 0.0)
    root = 1.0 / tl.sqrt(tl.sum(values * values) / D + tl.full([], EPS, WIDE))
    tl.store(rstd + r, root)
    values *= root
    if HAS_WEIGHT:
        values *= tl.load(weight + d * stride_w, mask=inside, other=0.0).to(WIDE)
    if HAS_BIAS:
        values += tl.load(bias + d * stride_b, mask=inside, other=0.0).to(WIDE)
    tl.store(y + r * D + d, values.to(y.dtype.element_ty), mask=inside)


def launch(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, widen: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`layer_norm` on a GPU: x (N, D), weight and bias (D,) or None -> y (N, D), rstd (N,)."""
    n, features = x.shape
    wide = statistic_dtype(x.dtype, double=True)
    y = torch.empty(x.shape, dtype=wide if widen else x.dtype, device=x.device)
    rstd = torch.full((n,), float("nan"), dtype=wide, device=x.device) if features == 0 else x.new_empty(n, dtype=wide)
    if y.numel() == 0:  # without features, the mean of nothing
        return y, rstd
    block, warps = tile(features)
    with torch.cuda.device_of(x):
        forward_kernel[(n,)](
            x,
            weight,
            bias,
            y,
            rstd,
            features,
            *x.stride(),
            0 if weight is None else weight.stride(0),
            0 if bias is None else bias.stride(0),
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            EPS=eps,
            WIDE=TRITON_DTYPES[wide],
            BLOCK=block,
            num_warps=warps,
        )
    return y, rstd


def workspace_bytes(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, widen: bool
) -> int:
    return 0
