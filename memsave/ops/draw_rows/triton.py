"""Triton kernels of `draw_rows`: the Philox sort keys, and which rows the systematic sample hits.

The sort, the gather and the integer cumulative sum stay torch calls on the device. All numbers are integers, so the
rows are those of the reference, bit for bit.

Shapes: q (N,) int64 in [1, 2^32] with sum k * 2^32, seed () int64, result (k,) int32 ascending.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..philox import OFFSET_STREAM, PERMUTATION_STREAM
from ..triton_philox import row_words

BLOCK = 1024
KEY_STREAM = tl.constexpr(PERMUTATION_STREAM)
START_STREAM = tl.constexpr(OFFSET_STREAM)


@triton.jit
def key_kernel(keys, seed, N, BLOCK: tl.constexpr):
    """keys[i]: 63 random bits of row i, by which the rows are permuted."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word0, word1, _, _ = row_words(i, KEY_STREAM, tl.load(seed))
    key = (word1.to(tl.int64) & 0x7FFFFFFF) << 32 | word0.to(tl.int64)
    tl.store(keys + i, key, mask=i < N)


@triton.jit
def thresholds_below(position, start):
    """How many of the thresholds start, start + 2^32, start + 2 * 2^32, ... lie below `position`, which is >= 0."""
    return ((position - start - 1) >> 32) + 1


@triton.jit
def hit_kernel(q_permuted, ends, permutation, seed, hits, N, K, BLOCK: tl.constexpr):
    """hits[j] = the row whose interval [end - q, end) holds the threshold j; each interval holds at most one."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < N
    end = tl.load(ends + p, mask=inside, other=0)
    begin = end - tl.load(q_permuted + p, mask=inside, other=0)
    row = tl.load(permutation + p, mask=inside, other=0)
    start, _, _, _ = row_words(tl.full([1], 0, tl.int64), START_STREAM, tl.load(seed))
    before = thresholds_below(begin, start.to(tl.int64))
    after = thresholds_below(end, start.to(tl.int64))
    tl.store(hits + before, row.to(tl.int32), mask=inside & (after > before) & (before < K))


def launch(q: torch.Tensor, k: int, seed: torch.Tensor) -> torch.Tensor:
    """`draw_rows` on a GPU: q (N,) int64, seed () int64 -> (k,) int32, ascending, no duplicates; no host sync."""
    count = q.shape[0]
    grid = (triton.cdiv(count, BLOCK),)
    with torch.cuda.device_of(q):
        keys = torch.empty(count, dtype=torch.int64, device=q.device)
        key_kernel[grid](keys, seed, count, BLOCK=BLOCK)
        permutation = torch.sort(keys, stable=True).indices
        q_permuted = q[permutation]
        ends = q_permuted.cumsum(0)
        # zeros, not empty: a q that breaks its contract (the sum) must not become a row number out of range
        hits = torch.zeros(k, dtype=torch.int32, device=q.device)
        hit_kernel[grid](q_permuted, ends, permutation, seed, hits, count, k, BLOCK=BLOCK)
        return hits.sort().values


def workspace_bytes(q: torch.Tensor, k: int, seed: torch.Tensor) -> int:
    """The keys, and what sorting takes: its two results and, as an estimate, scratch of the same size."""
    return 5 * 8 * q.shape[0]
