"""Triton kernels of `pq_select_blocks`: weights summed block by block, then shares; torch picks the largest.

B sequences, H heads, N query blocks, r representatives, S keys in L blocks, M subspaces, K key blocks to keep. All
numbers are integers, so the order of sums does not matter. Blocks are ranked by rank = share * L + number, which no two
blocks have in common: of equal shares the later block's is larger.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import triton_codes
from ..triton_codes import estimates, mask_and_strides, visible_range

SHARE_BITS = tl.constexpr(16)
LAST_LEVEL = tl.constexpr(255)
WARPS = 4


@triton.jit(do_not_specialize=["FIRST", "position", "window"])
def sum_kernel(
    table,
    weights,
    codes,
    mask,
    sums,
    FIRST,
    blocks,
    H,
    S,
    L,
    position,
    window,
    stride_table_b,
    stride_table_h,
    stride_table_n,
    stride_table_i,
    stride_table_m,
    stride_table_e,
    stride_weights_b,
    stride_weights_h,
    stride_weights_n,
    stride_weights_i,
    stride_weights_e,
    stride_codes_b,
    stride_codes_h,
    stride_codes_p,
    stride_codes_s,
    stride_mask_b,
    stride_mask_h,
    stride_mask_n,
    stride_mask_s,
    REPRESENTATIVES: tl.constexpr,
    M: tl.constexpr,
    SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCKS: tl.constexpr,
    INSIDE: tl.constexpr,
):
    """sums (B * H, blocks, r, L) from query block FIRST on: one representative, BLOCKS key blocks; -1: nothing seen."""
    key_tiles = tl.cdiv(L, BLOCKS)
    row = tl.program_id(0) // key_tiles  # of (B * H, blocks, r)
    head = row // REPRESENTATIVES // blocks
    i, n = (row % REPRESENTATIVES).to(tl.int64), (row // REPRESENTATIVES % blocks).to(tl.int64) + FIRST
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    number = (tl.program_id(0) % key_tiles).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    own = n * SIZE + position
    begin, end = visible_range(own, own, S, window, IS_CAUSAL)  # what counts is what the first query sees
    total = tl.zeros((BLOCKS,), tl.int64)
    seen = tl.zeros((BLOCKS,), tl.int32)
    of_row = table + b * stride_table_b + h * stride_table_h + n * stride_table_n + i * stride_table_i
    weight = weights + b * stride_weights_b + h * stride_weights_h + n * stride_weights_n + i * stride_weights_i
    start = (tl.program_id(0) % key_tiles).to(tl.int64) * BLOCKS * SIZE
    if (start < end) & (start + BLOCKS * SIZE > begin):
        for step in range(0, SIZE, INSIDE):
            inside = step + tl.arange(0, INSIDE)
            s = number[:, None] * SIZE + inside[None, :]  # (BLOCKS, INSIDE)
            counts = (inside < SIZE)[None, :] & (s >= begin) & (s < end)
            if mask is not None:
                at = mask + b * stride_mask_b + h * stride_mask_h + n * stride_mask_n + s * stride_mask_s
                counts = counts & (tl.load(at, mask=counts, other=0) != 0)
            level = estimates(
                tl.zeros((BLOCKS, INSIDE), tl.int32),
                of_row,
                codes + b * stride_codes_b + h * stride_codes_h,
                s,
                counts,
                stride_table_m,
                stride_table_e,
                stride_codes_p,
                stride_codes_s,
                M,
            )
            level = tl.minimum(level, LAST_LEVEL)
            given = tl.load(weight + level * stride_weights_e, mask=counts, other=0)
            total += tl.sum(given.to(tl.int64), 1)
            seen = tl.maximum(seen, tl.max(counts.to(tl.int32), 1))
    tl.store(sums + row.to(tl.int64) * L + number, tl.where(seen != 0, total, -1), mask=number < L)


@triton.jit(do_not_specialize=["FIRST", "position"])
def rank_kernel(
    sums,
    ranks,
    FIRST,
    blocks,
    L,
    position,
    REPRESENTATIVES: tl.constexpr,
    SIZE: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """ranks (B * H, blocks, L) of one query block: -1 for what is hidden, the largest for what is always kept."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    of_row = sums + (row * REPRESENTATIVES + i)[:, None] * L
    totals = tl.zeros((BLOCK_I,), tl.int64)
    for start in range(0, L, BLOCK_L):
        number = start + tl.arange(0, BLOCK_L).to(tl.int64)
        inside = (i < REPRESENTATIVES)[:, None] & (number < L)[None, :]
        totals += tl.sum(tl.maximum(tl.load(of_row + number[None, :], mask=inside, other=0), 0), 1)
    totals = tl.maximum(totals, 1)
    own = (FIRST + row % blocks) * SIZE + position
    for start in range(0, L, BLOCK_L):
        number = start + tl.arange(0, BLOCK_L).to(tl.int64)
        inside = (i < REPRESENTATIVES)[:, None] & (number < L)[None, :]
        here = tl.load(of_row + number[None, :], mask=inside, other=0)
        shares = (tl.maximum(here, 0) << SHARE_BITS) // totals[:, None]
        share = tl.sum(shares, 0)
        always = tl.full([], REPRESENTATIVES, tl.int64) << SHARE_BITS
        always += 1
        rank = tl.where(number == 0, always, share) * L + number
        rank = tl.where(tl.min(here, 0) < 0, -1, rank)  # nothing in it counts
        if LOCAL:  # a query of this block stands in it
            stand_in = ((number + 1) * SIZE > own) & (number * SIZE < own + SIZE)
            rank = tl.where(stand_in, always * L + number, rank)
        tl.store(ranks + row * L + number, rank, mask=number < L)


def chunk_blocks(table: torch.Tensor, key_blocks: int) -> int:
    """How many query blocks are computed together."""
    batch, heads, _, representatives = table.shape[:4]
    return triton_codes.chunk(8 * batch * heads * representatives * key_blocks)


def launch(
    table: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> torch.Tensor:
    """`pq_select_blocks` on a GPU: table (B, H, N, r, M, 16), codes (B, H, P, S) -> (B, H, N, K) int32."""
    batch, heads, blocks, representatives, subspaces, _ = table.shape
    keys = codes.shape[3]
    key_blocks = triton.cdiv(keys, block_size)
    out = table.new_full((batch, heads, blocks, keep), -1, dtype=torch.int32)
    if out.numel() == 0 or keys == 0:
        return out
    mask, of_mask = mask_and_strides(mask, (batch, heads, blocks, keys))
    step = min(chunk_blocks(table, key_blocks), blocks)
    inside = min(triton.next_power_of_2(block_size), triton_codes.SUM_KEYS)
    tile = triton_codes.SUM_KEYS // inside
    width = min(triton.next_power_of_2(key_blocks), triton_codes.ROW_BLOCKS)
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        rows = batch * heads * count
        sums = table.new_empty((batch, heads, count, representatives, key_blocks), dtype=torch.int64)
        ranks = table.new_empty((batch, heads, count, key_blocks), dtype=torch.int64)
        with torch.cuda.device_of(table):
            sum_kernel[(rows * representatives * triton.cdiv(key_blocks, tile),)](
                table,
                weights,
                codes,
                mask,
                sums,
                *(first, count, heads, keys, key_blocks, position, window),
                *table.stride(),
                *weights.stride(),
                *codes.stride(),
                *of_mask,
                REPRESENTATIVES=representatives,
                M=subspaces,
                SIZE=block_size,
                IS_CAUSAL=is_causal,
                BLOCKS=tile,
                INSIDE=inside,
                num_warps=WARPS,
            )
            rank_kernel[(rows,)](
                sums,
                ranks,
                *(first, count, key_blocks, position),
                REPRESENTATIVES=representatives,
                SIZE=block_size,
                LOCAL=local,
                BLOCK_I=triton.next_power_of_2(representatives),
                BLOCK_L=width,
                num_warps=WARPS,
            )
        del sums
        out[:, :, first : first + count, : min(keep, key_blocks)] = largest(ranks, keep)
        del ranks
    return out


def largest(ranks: torch.Tensor, keep: int) -> torch.Tensor:
    """(B, H, n, L) -> (B, H, n, min(K, L)): the blocks of the largest ranks, ascending; -1 for those below 0."""
    count = ranks.shape[-1]
    best = ranks.topk(min(keep, count), -1, sorted=False).values
    found = torch.where(best < 0, count, best % count).sort(-1).values
    return found.masked_fill_(found == count, -1)


def workspace_bytes(
    table: torch.Tensor,
    weights: torch.Tensor,
    codes: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> int:
    """Of a chunk: sums and ranks, then ranks, the kept ones with their places, and those sorted."""
    batch, heads, blocks, representatives = table.shape[:4]
    key_blocks = triton.cdiv(codes.shape[3], block_size)
    rows, kept = batch * heads * min(chunk_blocks(table, key_blocks), blocks), min(keep, key_blocks)
    return 8 * rows * (key_blocks + max(representatives * key_blocks, 5 * kept))
