"""What the Triton kernels that hold whole rows share: a block for a row, and groups of rows for sums over rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
MIN_GROUPS, MAX_ROWS = 512, 64  # many groups occupy a GPU; rounding errors grow with the rows that one adds up


def tile(features: int, warp_threads: int = 64 if torch.version.hip else 32) -> tuple[int, int]:
    """(BLOCK, number of warps) for rows of `features` elements: 16 elements for each of at most 1,024 threads."""
    block = max(triton.next_power_of_2(features), 16)
    return block, min(max(block // 16, warp_threads), 1024) // warp_threads


def group_rows(n: int) -> int:
    """How many of n rows each program adds up."""
    return min(triton.cdiv(n, MIN_GROUPS), MAX_ROWS)
