"""Triton kernel of `rms_norm_backward`: each program takes a group of rows and sums their part of dweight.

Shapes: dy and x (N, D), rstd (N,), weight (D,) or None, results dx (N, D) and dweight (D,). The groups depend on N
alone and torch adds their sums, so the result is the same every time. A program holds a whole row,
up to 16,384 features in registers alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rms_norm.style import Style
from ..triton_rows import TRITON_DTYPES, group_rows, tile

ONE_PLUS = tl.constexpr(int(Style.ONE_PLUS))


@triton.jit
def backward_kernel(
    dy,
    x,
    rstd,
    weight,
    dx,
    sums,
    N,
    D,
    rows,
    stride_dy_n,
    stride_dy_d,
    stride_x_n,
    stride_x_d,
    stride_rstd,
    stride_w,
    STYLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of `rows` rows, and sums[group] = the sum over them of dy * xhat."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide_d = d.to(tl.int64)
    total = tl.zeros([BLOCK], WIDE)
    for r in range(group * rows, tl.minimum(group * rows + rows, N)):
        root = tl.load(rstd + r * stride_rstd)
        xhat = tl.load(x + r * stride_x_n + wide_d * stride_x_d, mask=inside, other=0.0).to(WIDE) * root
        dxhat = tl.load(dy + r * stride_dy_n + wide_d * stride_dy_d, mask=inside, other=0.0).to(WIDE)
        if NEEDS_DWEIGHT:
            total += dxhat * xhat
        if HAS_WEIGHT:
            scale = tl.load(weight + d * stride_w, mask=inside, other=0.0).to(WIDE)
            dxhat *= scale + 1.0 if STYLE == ONE_PLUS else scale
        mean = tl.sum(dxhat * xhat) / D
        tl.store(dx + r * D + d, ((dxhat - xhat * mean) * root).to(dx.dtype.element_ty), mask=inside)
    if NEEDS_DWEIGHT:
        tl.store(sums + group * D + d, total, mask=inside)


def launch(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    style: int,
    needs_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm_backward` on a GPU: dy, x (N, D), rstd (N,), weight (D,) or None -> dx (N, D), dweight (D,) or (0,)."""
    n, features = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, weight.new_zeros(features) if weight is not None and needs_dweight else x.new_empty(0)
    rows = group_rows(n)
    groups = triton.cdiv(n, rows)
    sums = None
    if weight is not None and needs_dweight:
        sums = torch.empty((groups, features), dtype=rstd.dtype, device=x.device)
    block, warps = tile(features)
    with torch.cuda.device_of(x):
        backward_kernel[(groups,)](
            dy,
            x,
            rstd,
            weight,
            dx,
            sums,
            n,
            features,
            rows,
            *dy.stride(),
            *x.stride(),
            rstd.stride(0),
            0 if weight is None else weight.stride(0),
            STYLE=style,
            HAS_WEIGHT=weight is not None,
            NEEDS_DWEIGHT=sums is not None,
            WIDE=TRITON_DTYPES[rstd.dtype],
            BLOCK=block,
            num_warps=warps,
        )
        if weight is None or sums is None:
            return dx, x.new_empty(0)
        dweight = sums.sum(0).to(weight.dtype)  # (D,)
    return dx, dweight


def workspace_bytes(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    style: int,
    needs_dweight: bool,
) -> int:
    """The groups' sums, and their sum where dweight has another dtype."""
    if weight is None or not needs_dweight or x.numel() == 0:
        return 0
    n, features = x.shape
    groups = triton.cdiv(n, group_rows(n))
    return rstd.itemsize * features * (groups + (weight.dtype != rstd.dtype))
