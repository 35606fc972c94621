"""Triton kernel of `gather_rows`: gather, scale and cast in one pass over the kept rows.

Shapes: x (N, D), rows (k,), scale (k,) or None, result (k, D).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 4096
MAX_BLOCK_D = 1024


@triton.jit
def gather_kernel(
    x,
    rows,
    scale,
    out,
    K,
    D,
    stride_n,
    stride_d,
    stride_row,
    stride_scale,
    HAS_SCALE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[r, d] = x[rows[r], d] * scale[r], one BLOCK_K x BLOCK_D tile for each program."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (r < K)[:, None] & (d < D)[None, :]
    row = tl.load(rows + r * stride_row, mask=r < K, other=0).to(tl.int64)
    values = tl.load(x + row[:, None] * stride_n + d[None, :] * stride_d, mask=inside, other=0.0)  # (BLOCK_K, BLOCK_D)
    if HAS_SCALE:
        factor = tl.load(scale + r * stride_scale, mask=r < K, other=0.0)
        # half types are widened by the float32 factor, float64 widens the factor: as in the reference
        values = (values.to(factor.dtype) if values.dtype.primitive_bitwidth < 32 else values) * factor[:, None]
    tl.store(out + r[:, None] * D + d[None, :], values.to(out.dtype.element_ty), mask=inside)


def tile(features: int) -> tuple[int, int]:
    """(BLOCK_K, BLOCK_D) for rows of `features` elements: whole rows if they fit, 4,096 elements in all."""
    block_d = min(triton.next_power_of_2(max(features, 1)), MAX_BLOCK_D)
    return min(TILE_ELEMENTS // block_d, 64), block_d


def launch(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """`gather_rows` on a GPU: x (N, D), rows (k,), scale (k,) or None -> (k, D) in the dtype of x."""
    kept, features = rows.shape[0], x.shape[1]
    out = torch.empty((kept, features), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_k, block_d = tile(features)
    with torch.cuda.device_of(x):
        gather_kernel[(triton.cdiv(kept, block_k), triton.cdiv(features, block_d))](
            x,
            rows,
            scale,
            out,
            kept,
            features,
            *x.stride(),
            *rows.stride(),
            0 if scale is None else scale.stride(0),
            HAS_SCALE=scale is not None,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
        )
    return out


def workspace_bytes(x: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor | None) -> int:
    return 0
