"""Triton kernel of `layer_norm_backward`: each program takes a group of rows and sums their part of dweight and dbias.

Shapes: dy and x (N, D), rstd (N,), weight (D,) or None, results dx (N, D), dweight and dbias (D,). The groups depend on
N alone and torch adds their sums, so the result is the same every time. A program holds a whole row, up to 8,192
features in registers alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_rows import TRITON_DTYPES, group_rows, tile


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
    HAS_WEIGHT: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of `rows` rows; over them sums[group, 0] = the sum of dy * xhat, sums[group, 1] = that of dy."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide_d = d.to(tl.int64)
    products = tl.zeros([BLOCK], WIDE)
    dys = tl.zeros([BLOCK], WIDE)
    for r in range(group * rows, tl.minimum(group * rows + rows, N)):
        root = tl.load(rstd + r * stride_rstd)
        wide = tl.load(x + r * stride_x_n + wide_d * stride_x_d, mask=inside, other=0.0).to(WIDE)
        xhat = (wide - tl.sum(wide) / D) * root  # not 0 outside of the row, but dxhat is
        dxhat = tl.load(dy + r * stride_dy_n + wide_d * stride_dy_d, mask=inside, other=0.0).to(WIDE)
        if NEEDS_SUMS:
            products += dxhat * xhat
            dys += dxhat
        if HAS_WEIGHT:
            dxhat *= tl.load(weight + d * stride_w, mask=inside, other=0.0).to(WIDE)
        rest = dxhat - tl.sum(dxhat) / D - xhat * (tl.sum(dxhat * xhat) / D)
        tl.store(dx + r * D + d, (rest * root).to(dx.dtype.element_ty), mask=inside)
    if NEEDS_SUMS:
        tl.store(sums + group * 2 * D + d, products, mask=inside)
        tl.store(sums + group * 2 * D + D + d, dys, mask=inside)


def launch(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`layer_norm_backward` on a GPU: dy, x (N, D), rstd (N,), weight (D,) or None -> dx (N, D) and two sums."""
    n, features = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    needed = (needs_dweight, needs_dbias)
    if x.numel() == 0:
        dweight, dbias = (rstd.new_zeros(features if wanted else 0) for wanted in needed)
        return dx, dweight, dbias
    rows = group_rows(n)
    groups = triton.cdiv(n, rows)
    sums = None
    if any(needed):
        sums = torch.empty((groups, 2, features), dtype=rstd.dtype, device=x.device)
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
            HAS_WEIGHT=weight is not None,
            NEEDS_SUMS=sums is not None,
            WIDE=TRITON_DTYPES[rstd.dtype],
            BLOCK=block,
            num_warps=warps,
        )
        dweight, dbias = (
            sums[:, i].sum(0) if sums is not None and wanted else rstd.new_empty(0)  # (D,)
            for i, wanted in enumerate(needed)
        )
    return dx, dweight, dbias


def workspace_bytes(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    needs_dweight: bool,
    needs_dbias: bool,
) -> int:
    """The groups' sums."""
    if not (needs_dweight or needs_dbias) or x.numel() == 0:
        return 0
    n, features = x.shape
    return rstd.itemsize * 2 * features * triton.cdiv(n, group_rows(n))
