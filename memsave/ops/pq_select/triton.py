"""Triton kernels of `pq_select`: estimates of some rows, and of each row the keys above a threshold.

B sequences, H heads, R rows, S keys, M subspaces, K keys to keep. The first kernel writes estimates in 16 bits, -1 for
keys that the mask hides. In the second a program has one row: among the keys that the row may see it finds the largest
estimate that at least K keys reach, by halving, then goes over them once more and writes those above it and the last
ones of those equal to it. Nothing is sorted.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import triton_codes
from ..triton_codes import estimates, mask_and_strides, visible_range

BLOCK_R, WARPS = 4, 4


@triton.jit(do_not_specialize=["FIRST", "position", "window"])
def estimate_kernel(
    table,
    codes,
    mask,
    out,
    FIRST,
    rows,
    H,
    S,
    position,
    window,
    stride_table_b,
    stride_table_h,
    stride_table_r,
    stride_table_m,
    stride_table_e,
    stride_codes_b,
    stride_codes_h,
    stride_codes_p,
    stride_codes_s,
    stride_mask_b,
    stride_mask_h,
    stride_mask_r,
    stride_mask_s,
    M: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """out (B * H, rows, S) of the rows from FIRST on: BLOCK_R of them and BLOCK_S keys."""
    key_tiles, row_tiles = tl.cdiv(S, BLOCK_S), tl.cdiv(rows, BLOCK_R)
    tile = tl.program_id(0) // key_tiles
    head = tile // row_tiles
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    r = (tile % row_tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    start = (tl.program_id(0) % key_tiles).to(tl.int64) * BLOCK_S
    s = (start + tl.arange(0, BLOCK_S))[None, :]
    row, inside = (FIRST + r)[:, None], (r < rows)[:, None] & (s < S)
    bottom = FIRST + (tile % row_tiles).to(tl.int64) * BLOCK_R + position
    begin, end = visible_range(bottom, bottom + BLOCK_R - 1, S, window, IS_CAUSAL)
    if (start < end) & (start + BLOCK_S > begin):  # the second kernel reads no others
        sees = inside
        if mask is not None:
            at = mask + b * stride_mask_b + h * stride_mask_h + row * stride_mask_r
            sees = inside & (tl.load(at + s * stride_mask_s, mask=inside, other=0) != 0)
        # Rows behind the last one read its table.
        of_row = table + b * stride_table_b + h * stride_table_h + tl.minimum(row, FIRST + rows - 1) * stride_table_r
        total = estimates(
            tl.zeros((BLOCK_R, BLOCK_S), tl.int32),
            of_row,
            codes + b * stride_codes_b + h * stride_codes_h,
            s,
            s < S,
            stride_table_m,
            stride_table_e,
            stride_codes_p,
            stride_codes_s,
            M,
        )
        place = out + (head.to(tl.int64) * rows + r[:, None]) * S + s
        tl.store(place, tl.where(sees, total, -1).to(tl.int16), mask=inside)


@triton.jit
def reaching(estimate, level, begin, end, BLOCK: tl.constexpr):
    """How many keys of a row have an estimate of at least `level`."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        count += (tl.load(estimate + s, mask=s < end, other=-1).to(tl.int32) >= level).to(tl.int32)
    return tl.sum(count)


@triton.jit(do_not_specialize=["FIRST", "position", "window"])
def keep_kernel(estimates, out, FIRST, rows, R, S, K, position, window, IS_CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """out[head, r] of one row, which holds -1 before: the K keys with the largest estimates, ascending."""
    head, r = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    estimate = estimates + (head * rows + r) * S
    own = FIRST + r + position
    begin, end = visible_range(own, own, S, window, IS_CAUSAL)
    peak = tl.full((BLOCK,), -1, tl.int32)
    for start in range(begin, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.load(estimate + s, mask=s < end, other=-1).to(tl.int32))
    # At least K keys reach `low`, or it is 0; fewer than K reach `high`.
    low, high = tl.max(peak) * 0, tl.max(peak) + 1
    reach_low, reach_high = reaching(estimate, low, begin, end, BLOCK), tl.max(peak) * 0
    while high - low > 1:
        middle = (low + high) // 2
        reach = reaching(estimate, middle, begin, end, BLOCK)
        enough = reach >= K
        low, reach_low = tl.where(enough, middle, low), tl.where(enough, reach, reach_low)
        high, reach_high = tl.where(enough, high, middle), tl.where(enough, reach_high, reach)
    too_many = tl.maximum(reach_low - K, 0)  # of those equal to `low`, the earlier keys
    equals, taken = reach_high * 0, (reach_high * 0).to(tl.int64)
    places = out + (head * R + FIRST + r) * K
    for start in range(begin, end, BLOCK):
        s = start + tl.arange(0, BLOCK)
        value = tl.load(estimate + s, mask=s < end, other=-1).to(tl.int32)
        equal = (value == low).to(tl.int32)
        number = equals + tl.cumsum(equal, 0)  # from 1 on
        kept = (value > low) | ((equal != 0) & (number > too_many))
        place = taken + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(places + place, s.to(tl.int32), mask=kept)
        equals += tl.sum(equal)
        taken += tl.sum(kept.to(tl.int32))


def chunk_rows(table: torch.Tensor, codes: torch.Tensor) -> int:
    """How many rows are computed together."""
    return triton_codes.chunk(2 * table.shape[0] * table.shape[1] * codes.shape[3])


def launch(
    table: torch.Tensor,
    codes: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    keep: int,
) -> torch.Tensor:
    """`pq_select` on a GPU: table (B, H, R, M, 16), codes (B, H, P, S) -> (B, H, R, K) int32."""
    batch, heads, rows, subspaces, _ = table.shape
    keys = codes.shape[3]
    out = table.new_full((batch, heads, rows, keep), -1, dtype=torch.int32)
    if out.numel() == 0 or keys == 0:
        return out
    mask, of_mask = mask_and_strides(mask, (batch, heads, rows, keys))
    step, width = min(chunk_rows(table, codes), rows), triton_codes.ESTIMATE_KEYS
    found = table.new_empty((batch * heads, step, keys), dtype=torch.int16)
    with torch.cuda.device_of(table):
        for first in range(0, rows, step):
            count = min(step, rows - first)
            tiles = batch * heads * triton.cdiv(count, BLOCK_R) * triton.cdiv(keys, width)
            estimate_kernel[(tiles,)](
                table,
                codes,
                mask,
                found,
                *(first, count, heads, keys, position, window),
                *table.stride(),
                *codes.stride(),
                *of_mask,
                M=subspaces,
                IS_CAUSAL=is_causal,
                BLOCK_R=BLOCK_R,
                BLOCK_S=width,
                num_warps=WARPS,
            )
            keep_kernel[(batch * heads * count,)](
                found,
                out,
                *(first, count, rows, keys, keep, position, window),
                IS_CAUSAL=is_causal,
                BLOCK=triton_codes.ROW_KEYS,
                num_warps=WARPS,
            )
    return out


def workspace_bytes(
    table: torch.Tensor,
    codes: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    keep: int,
) -> int:
    """The estimates of a chunk."""
    batch, heads, rows = table.shape[:3]
    return 2 * batch * heads * min(chunk_rows(table, codes), rows) * codes.shape[3]
