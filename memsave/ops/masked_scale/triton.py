"""Triton kernel of `masked_scale`.

Shapes: x and y (N, D), bits (N, B) with B = ceil(D / 8).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # elements of a program


@triton.jit
def scale_kernel(
    x,
    bits,
    y,
    NUMEL,
    D,
    stride_x_n,
    stride_x_d,
    stride_bits_n,
    stride_bits_b,
    SCALE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y[n, d] = x[n, d] * (scale where bit d of row n is set, else 0), BLOCK elements for each program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < NUMEL
    row, d = i // D, i % D
    byte = tl.load(bits + row * stride_bits_n + (d // 8) * stride_bits_b, mask=inside, other=0).to(tl.int32)
    is_set = (byte >> (d % 8).to(tl.int32)) & 1
    values = tl.load(x + row * stride_x_n + d * stride_x_d, mask=inside, other=0.0).to(WIDE)
    factor = is_set.to(WIDE) * tl.full([], SCALE, WIDE)
    tl.store(y + i, (values * factor).to(y.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, bits: torch.Tensor, scale: float) -> torch.Tensor:
    """`masked_scale` on a GPU: x (N, D), bits (N, B) -> (N, D) in the dtype of x."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        scale_kernel[(triton.cdiv(y.numel(), BLOCK),)](
            *(x, bits, y, y.numel(), x.shape[1], *x.stride(), *bits.stride()),
            SCALE=scale,  # as a constant, since Triton would round an argument to float32
            WIDE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK,
        )
    return y


def workspace_bytes(x: torch.Tensor, bits: torch.Tensor, scale: float) -> int:
    return 0
