"""Kernels that write down the words of the Philox device functions, for the tests to read."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memsave.ops.triton_philox import philox4x32, row_words


@triton.jit
def _philox_kernel(counter, key, out):
    words = philox4x32(tl.load(counter), tl.load(counter + 1), tl.load(counter + 2), tl.load(counter + 3), tl.load(key))
    for i in tl.static_range(4):
        tl.store(out + i, words[i].to(tl.int64))


@triton.jit
def _row_words_kernel(rows, seed, out, STREAM: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    words = row_words(tl.load(rows + i), STREAM, tl.load(seed))
    for w in tl.static_range(4):
        tl.store(out + w * N + i, words[w].to(tl.int64))


def philox_words(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(4,) int64: the words of a (4,) int64 counter under a 0-d int64 key."""
    out = torch.empty(4, dtype=torch.int64, device=key.device)
    _philox_kernel[(1,)](counter, key, out)
    return out


def words_of_rows(rows: torch.Tensor, stream: int, seed: torch.Tensor) -> torch.Tensor:
    """(4, N) int64: the words of (N,) int64 rows; N a power of two."""
    out = torch.empty(4, rows.numel(), dtype=torch.int64, device=seed.device)
    _row_words_kernel[(1,)](rows, seed, out, stream, rows.numel())
    return out
