"""What the Triton kernels that estimate products from codes share: the sums of table entries, and which keys count."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

CHUNK_BYTES = 32 * 2**20  # of what the keys of several rows give: it stays in the L2 cache
ESTIMATE_KEYS, SUM_KEYS = 256, 512  # of a tile where table entries are added up
ROW_KEYS, ROW_BLOCKS = 1024, 512  # that a program which has a whole row takes at once


@triton.jit
def estimates(total, tables, codes, s, valid, stride_m, stride_e, stride_p, stride_s, M: tl.constexpr):
    """total, int32, and the sum over M subspaces of tables[m, code[m, s]] for the valid ones of keys s.

    `tables` are pointers that broadcast with s; `total` has the shape of both. The 16 entries of a subspace lie side by
    side: all threads of a warp read the same part of the cache.
    """
    places = codes + s * stride_s
    for p in range(M // 2):
        both = tl.load(places + tl.full([], p, tl.int64) * stride_p, mask=valid, other=0).to(tl.int32)
        entry = tables + tl.full([], 2 * p, tl.int64) * stride_m
        total += tl.load(entry + (both & 15) * stride_e, mask=valid, other=0).to(tl.int32)
        total += tl.load(entry + stride_m + (both >> 4) * stride_e, mask=valid, other=0).to(tl.int32)
    if M % 2 == 1:
        last = tl.load(places + tl.full([], M // 2, tl.int64) * stride_p, mask=valid, other=0).to(tl.int32)
        entry = tables + tl.full([], M - 1, tl.int64) * stride_m
        total += tl.load(entry + (last & 15) * stride_e, mask=valid, other=0).to(tl.int32)
    return total


@triton.jit
def visible_range(first, last, S, window, IS_CAUSAL: tl.constexpr):
    """(begin, end) of the keys that queries beside `first` to `last` may see; all others are hidden from all."""
    end = tl.full([], S, tl.int64)
    if IS_CAUSAL:
        end = tl.minimum(end, last + 1)
    begin = tl.maximum(tl.where(window > 0, first - window + 1, 0), 0)
    return begin, end


def chunk(row_bytes: int) -> int:
    """How many rows are computed together."""
    return max(1, CHUNK_BYTES // max(1, row_bytes))


def mask_and_strides(mask: torch.Tensor | None, full: tuple[int, ...]) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """A bool mask as bytes, and its strides along `full`: 0 where it is broadcast."""
    if mask is None:
        return None, (0,) * len(full)
    given = mask.view(torch.uint8).expand(full)
    return given, given.stride()
