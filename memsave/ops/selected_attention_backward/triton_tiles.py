"""Which tiles the Triton kernels of `selected_attention_backward` take, and how many query blocks at once."""

from __future__ import annotations

import torch

from ..selected_attention.triton_rows import WARP_THREADS, power_of_2

CHUNK_INDICES = 2**22  # that are sorted together


def query_tile(
    rows: int, widest: int, dtype: torch.dtype, masked: bool, warp_threads: int = WARP_THREADS
) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) of `query_kernel` for so many rows of a query block; see `tile_of`.

    Larger tiles spill, above all where addresses of a mask take registers: tests/triton/test_aot.py.
    """
    if dtype.itemsize == 4:
        return 16, 16, 4, 1
    if warp_threads == 64:
        return min(power_of_2(rows), 32 if masked or widest > 128 else 64), 16 if widest > 128 else 32, 4, 1
    block_m = min(power_of_2(rows), 32 if masked else 64)
    if widest > 128:
        return (block_m, 32, 8, 1) if masked else (block_m, 16, 8, 2)
    return block_m, 32 if masked else 64, 8 if block_m == 64 else 4, 2 if masked else 3


def key_tile(
    keys: int, widest: int, dtype: torch.dtype, masked: bool, warp_threads: int = WARP_THREADS
) -> tuple[int, int, int, int]:
    """The same of `key_kernel` for so many keys of a block: BLOCK_N of them stay on chip."""
    narrow = masked or widest > 128 or warp_threads == 64 or dtype.itemsize == 4
    block_n = min(power_of_2(keys), 32 if narrow else 64)
    if dtype.itemsize == 4:
        return 16, block_n, 4, 1
    if warp_threads == 64:
        return 16 if masked or widest > 128 else 32, block_n, 4, 1
    if masked:
        return 32 if widest <= 128 else 16, block_n, 4 if widest <= 64 or block_n == 16 else 8, 2
    block_m = 64 if widest <= (128 if block_n == 16 else 64) else 32
    return block_m, block_n, 4 if block_n == 16 else 8, 2


def chunk_blocks(indices: torch.Tensor) -> int:
    """How many query blocks have their indices sorted together."""
    batch, groups, _, kept = indices.shape
    return max(1, CHUNK_INDICES // max(1, batch * groups * kept))
