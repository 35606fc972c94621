"""Which tiles the Triton kernels of `low_rank_attention` take, and into how many slices the keys are split.

kv key/value heads, T queries, S keys, head size D, rank Rv of the values; a key/value head has T * h / kv rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .sizes import Sizes

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_D, MAX_ROWS = 256, 65535 * 16
WARP_THREADS = 64 if torch.version.hip else 32
SLICE_PROGRAMS, SLICE_MIN_KEYS = 256, 256
MAX_LATENTS = 256  # that a program adds up for a row


@dataclass(frozen=True)
class Tile:
    """One set of tiles: rows, keys, a step of the ranks, half a head, and what is accumulated for a row.

    Attributes:
        in_rank_space: whether that is latents (Rv), or values (D), which are rebuilt.
        block_d: how many features of the result are made at once of latents.
    """

    block_m: int
    block_n: int
    block_r: int
    block_h: int
    block_w: int
    block_d: int
    in_rank_space: bool
    warps: int
    stages: int

    def constants(self) -> dict[str, int | bool]:
        blocks = {f"BLOCK_{name}": getattr(self, f"block_{name.lower()}") for name in "MNRHWD"}
        return {**blocks, "IN_RANK_SPACE": self.in_rank_space}


def power_of_2(n: int) -> int:
    """The smallest that is at least n and 16, the least size that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def tile_of(size: Sizes, dtype: torch.dtype, warp_threads: int = WARP_THREADS) -> Tile:
    rows, half = size.T * size.group, power_of_2((size.D + 1) // 2)
    # Larger tiles spill: tests/triton/test_aot.py. On AMD each mask of a load takes scalar registers, too.
    narrow = half > 64 or dtype.itemsize == 4 or (warp_threads == 64 and size.D != 2 * half)
    block_m = 16 if rows <= 16 or narrow else 32
    latents = power_of_2(size.Rv)
    # For each key, as plan.py counts; here every tile of rows rebuilds the values again.
    fewer = block_m * size.Rv <= size.D * size.Rv + block_m * size.D
    in_rank_space = fewer and latents <= MAX_LATENTS
    return Tile(
        block_m=block_m,
        block_n=16 if warp_threads == 64 or (half > 32 and dtype.itemsize == 4) else 32,
        block_r=32 if dtype.itemsize == 2 else 16,
        block_h=half,
        block_w=latents if in_rank_space else 2 * half,
        block_d=16,
        in_rank_space=in_rank_space,
        warps=8 if warp_threads == 32 and (half > 32 or block_m > 16) else 4,
        stages=2,
    )


def slice_keys(size: Sizes, tile: Tile) -> int:
    """Keys of a slice, whole tiles: enough programs to fill a GPU, and enough keys for each."""
    programs = size.B * size.kv * -(-size.T * size.group // tile.block_m)
    slices = max(1, min(SLICE_PROGRAMS // programs, size.S // SLICE_MIN_KEYS))
    return -(-size.S // (slices * tile.block_n)) * tile.block_n


def precision(dtype: torch.dtype) -> str:
    """TF32 products only where the user allowed them for torch's own GEMMs."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
