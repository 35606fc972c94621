"""Triton kernel of `pack_bits`.

Shapes: mask (N, D), bits (N, B) with B = ceil(D / 8).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 512  # bytes of a program


@triton.jit
def pack_kernel(mask, bits, NUM_BYTES, D, BYTES_PER_ROW, stride_n, stride_d, BLOCK: tl.constexpr):
    """bits[i] = the sum of mask[row, 8 c + k] * 2^k over k, for byte c of a row; BLOCK bytes for each program."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, byte = i // BYTES_PER_ROW, i % BYTES_PER_ROW
    place = tl.arange(0, 8)
    d = byte[:, None] * 8 + place[None, :]  # (BLOCK, 8)
    inside = (i < NUM_BYTES)[:, None] & (d < D)
    values = tl.load(mask + row[:, None] * stride_n + d * stride_d, mask=inside, other=0).to(tl.int32)
    packed = tl.sum(values << place[None, :], axis=1)
    tl.store(bits + i, packed.to(tl.uint8), mask=i < NUM_BYTES)


def launch(mask: torch.Tensor) -> torch.Tensor:
    """`pack_bits` on a GPU: mask (N, D) -> (N, B) uint8."""
    n, d = mask.shape
    bits = torch.empty((n, (d + 7) // 8), dtype=torch.uint8, device=mask.device)
    if bits.numel() == 0:
        return bits
    with torch.cuda.device_of(mask):
        pack_kernel[(triton.cdiv(bits.numel(), BLOCK),)](
            mask.view(torch.uint8), bits, bits.numel(), d, bits.shape[1], *mask.stride(), BLOCK=BLOCK
        )
    return bits


def workspace_bytes(mask: torch.Tensor) -> int:
    return 0
