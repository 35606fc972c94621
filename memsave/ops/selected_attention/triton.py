"""Triton kernel of `selected_attention`: a block of queries goes over the keys that it chose, gathered tile by tile.

B sequences, h query and kv key/value heads, G = h / kv, R queries in N blocks, S keys, K key blocks for each, head
sizes D and E. All G * SIZE query rows of a block have the same keys: rows are numbered (head in the group) * SIZE +
query, and a program takes BLOCK_M of them. A tile of keys may come from several blocks, or from a part of one, so every
block size is served, single keys included. Products take the dtype of the query and are accumulated in float32.

float64 and heads of more than 256 features (128 in float32) have no kernel: plain PyTorch serves them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_codes import mask_and_strides
from . import tiled
from .triton_rows import (
    LOG2_E,
    NONE,
    WARP_THREADS,
    chosen_keys,
    has_kernel,
    number_of_chosen,
    power_of_2,
    precision,
    products,
    step_of,
    visible,
)

COUNTED = tl.constexpr(64)


@triton.jit(do_not_specialize=["position", "window"])
def attention_kernel(
    query,
    key,
    value,
    indices,
    mask,
    out,
    logsumexp,
    KV,
    R,
    S,
    N,
    K,
    position,
    window,
    stride_query_b,
    stride_query_h,
    stride_query_r,
    stride_query_d,
    stride_key_b,
    stride_key_h,
    stride_key_s,
    stride_key_d,
    stride_value_b,
    stride_value_h,
    stride_value_s,
    stride_value_e,
    stride_indices_b,
    stride_indices_h,
    stride_indices_n,
    stride_indices_k,
    stride_mask_b,
    stride_mask_h,
    stride_mask_r,
    stride_mask_s,
    G: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    SCALE: tl.constexpr,
    SIZE: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (B, h, R, E) and logsumexp (B, h, R) of BLOCK_M rows of one query block."""
    tiles = tl.cdiv(G * SIZE, BLOCK_M)
    n, group = tl.program_id(0) // tiles % N, tl.program_id(0) // tiles // N
    b, g = (group // KV).to(tl.int64), (group % KV).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = n * SIZE + m % SIZE, g * G + m // SIZE
    inside = (m < G * SIZE) & (row < R)
    wide_row = row.to(tl.int64)
    d, e = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_E).to(tl.int64)
    queries = query + b * stride_query_b + head * stride_query_h + wide_row * stride_query_r
    if BLOCK_K == 0:
        at = queries[:, None] + d[None, :] * stride_query_d
        q = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)
    chosen = indices + b * stride_indices_b + g * stride_indices_h + n.to(tl.int64) * stride_indices_n
    count = number_of_chosen(chosen, K, stride_indices_k, COUNTED)
    keys, values = key + b * stride_key_b + g * stride_key_h, value + b * stride_value_b + g * stride_value_h
    of_row = b * stride_mask_b + g * stride_mask_h + wide_row * stride_mask_r
    peak = tl.full((BLOCK_M,), NONE, tl.float32)  # in powers of 2, as all scores
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for begin in range(0, count * SIZE, BLOCK_N):
        s, valid = chosen_keys(chosen, begin + tl.arange(0, BLOCK_N), count, S, stride_indices_k, SIZE)
        wide_s = s.to(tl.int64)
        if BLOCK_K == 0:
            k = tl.load(
                keys + wide_s[:, None] * stride_key_s + d[None, :] * stride_key_d,
                mask=valid[:, None] & (d < D)[None, :],
                other=0.0,
            )  # (BLOCK_N, BLOCK_D)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            scores = products(
                queries,
                keys + wide_s * stride_key_s,
                inside,
                valid,
                D,
                stride_query_d,
                stride_key_d,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                PRECISION,
            )
        scores *= SCALE * LOG2_E
        sees = inside[:, None] & valid[None, :]
        sees = visible(
            sees,
            (row + position)[:, None],
            s[None, :],
            mask,
            of_row[:, None],
            window,
            stride_mask_s,
            IS_CAUSAL,
            HAS_WINDOW,
        )
        scores = tl.where(sees, scores, NONE)  # (BLOCK_M, BLOCK_N)
        before = peak
        peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(peak == NONE, 0.0, peak)
        decay = tl.exp2(before - shift)
        exponentials = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(exponentials, 1)
        v = tl.load(
            values + wide_s[:, None] * stride_value_s + e[None, :] * stride_value_e,
            mask=valid[:, None] & (e < E)[None, :],
            other=0.0,
        )  # (BLOCK_N, BLOCK_E)
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(exponentials.to(v.dtype), v, accumulated, input_precision=PRECISION)
    sum_or_one = tl.where(total == 0.0, 1.0, total)  # of a row that sees nothing
    result = accumulated / sum_or_one[:, None]
    place = (b * KV * G + head) * R + wide_row
    at = out + place[:, None] * E + e[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None] & (e < E)[None, :])
    tl.store(logsumexp + place, (peak + tl.log2(sum_or_one)) / LOG2_E, mask=inside)


def tile_of(
    rows: int, widest: int, dtype: torch.dtype, masked: bool, warp_threads: int = WARP_THREADS
) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) for so many rows of a query block, and padded heads of `widest` features."""
    if dtype.itemsize == 4:
        return min(power_of_2(rows), 32), 32, 4, 1
    narrow = masked or widest > 128  # addresses of a mask take registers, too: tests/triton/test_aot.py
    block_m = min(power_of_2(rows), 64 if narrow or warp_threads == 64 else 128)
    if warp_threads == 64:
        return block_m, 32, 4, 1
    if narrow:
        return block_m, 32, 8 if widest > 128 else 4, 2
    return block_m, 64, 8 if block_m > 64 else 4, 3  # indices are loaded in one step, keys in the next


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selected_attention` on a GPU -> (B, h, R, E) in the dtype of query, and (B, h, R) float32."""
    if not has_kernel(query, value):
        return tiled.selected_attention(
            query, key, value, indices, mask, is_causal, window, position, block_size, scale
        )
    batch, heads, rows, features = query.shape
    groups, keys, width = value.shape[1:]
    blocks, kept = indices.shape[2:]
    out = query.new_empty((batch, heads, rows, width))
    logsumexp = query.new_empty((batch, heads, rows), dtype=torch.float32)
    if logsumexp.numel() == 0:
        return out, logsumexp
    group_rows = heads // groups * block_size
    block_d, block_e = power_of_2(features), power_of_2(width)
    block_m, block_n, warps, stages = tile_of(group_rows, max(block_d, block_e), query.dtype, mask is not None)
    mask, of_mask = mask_and_strides(mask, (batch, groups, rows, keys))
    with torch.cuda.device_of(query):
        attention_kernel[(batch * groups * blocks * triton.cdiv(group_rows, block_m),)](
            query,
            key,
            value,
            indices,
            mask,
            out,
            logsumexp,
            *(groups, rows, keys, blocks, kept, position, window),
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *indices.stride(),
            *of_mask,
            G=heads // groups,
            D=features,
            E=width,
            SCALE=scale,
            SIZE=block_size,
            IS_CAUSAL=is_causal,
            HAS_WINDOW=window > 0,
            PRECISION=precision(query.dtype),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            BLOCK_E=block_e,
            BLOCK_K=step_of(query.dtype),
            num_warps=warps,
            num_stages=stages,
        )
    return out, logsumexp


def workspace_bytes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> int:
    """Nothing, unless plain PyTorch serves."""
    if has_kernel(query, value):
        return 0
    return tiled.workspace_bytes(query, key, value, indices, mask, is_causal, window, position, block_size, scale)
