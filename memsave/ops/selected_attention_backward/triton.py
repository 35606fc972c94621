"""Triton kernels of `selected_attention_backward`: one for the gradient of queries, one for those of keys and values.

Shapes as in `selected_attention`. The first goes over the keys of a query block as the forward does. The second goes
over the query blocks that chose a key block: torch sorts the indices of a chunk of query blocks, and all query heads
and queries of these blocks follow each other as rows. One program adds up each number, in a fixed order and without
atomics, so the result is the same every time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..selected_attention.triton_rows import (
    NONE,
    chosen_keys,
    has_kernel,
    number_of_chosen,
    power_of_2,
    precision,
    products,
    step_of,
    visible,
)
from ..triton_codes import mask_and_strides
from . import tiled
from .triton_tiles import chunk_blocks, key_tile, query_tile

COUNTED = tl.constexpr(64)


@triton.jit(do_not_specialize=["position", "window"])
def query_kernel(
    doutput,
    query,
    key,
    value,
    indices,
    mask,
    output,
    logsumexp,
    dquery,
    delta,
    KV,
    R,
    S,
    N,
    K,
    position,
    window,
    stride_doutput_b,
    stride_doutput_h,
    stride_doutput_r,
    stride_doutput_e,
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
    stride_output_b,
    stride_output_h,
    stride_output_r,
    stride_output_e,
    stride_logsumexp_b,
    stride_logsumexp_h,
    stride_logsumexp_r,
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
    """dquery (B, h, R, D), and delta (B, h, R) = the sum of doutput * output, of BLOCK_M rows of one query block."""
    tiles = tl.cdiv(G * SIZE, BLOCK_M)
    n, group = tl.program_id(0) // tiles % N, tl.program_id(0) // tiles // N
    b, g = (group // KV).to(tl.int64), (group % KV).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = n * SIZE + m % SIZE, g * G + m // SIZE
    inside = (m < G * SIZE) & (row < R)
    wide_row = row.to(tl.int64)
    d, e = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_E).to(tl.int64)
    in_d, in_e = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < E)[None, :]
    queries = query + b * stride_query_b + head * stride_query_h + wide_row * stride_query_r
    if BLOCK_K == 0:
        q = tl.load(queries[:, None] + d[None, :] * stride_query_d, mask=in_d, other=0.0)
    gradients = doutput + b * stride_doutput_b + head * stride_doutput_h + wide_row * stride_doutput_r
    dy = tl.load(gradients[:, None] + e[None, :] * stride_doutput_e, mask=in_e, other=0.0)
    rows = output + b * stride_output_b + head * stride_output_h + wide_row * stride_output_r
    y = tl.load(rows[:, None] + e[None, :] * stride_output_e, mask=in_e, other=0.0)
    own_delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    place = (b * KV * G + head) * R + wide_row
    tl.store(delta + place, own_delta, mask=inside)
    at = logsumexp + b * stride_logsumexp_b + head * stride_logsumexp_h + wide_row * stride_logsumexp_r
    shift = tl.load(at, mask=inside, other=0.0)
    shift = tl.where(shift == NONE, 0.0, shift)  # a row that sees nothing has -inf here and in all scores
    chosen = indices + b * stride_indices_b + g * stride_indices_h + n.to(tl.int64) * stride_indices_n
    count = number_of_chosen(chosen, K, stride_indices_k, COUNTED)
    keys, values = key + b * stride_key_b + g * stride_key_h, value + b * stride_value_b + g * stride_value_h
    of_row = b * stride_mask_b + g * stride_mask_h + wide_row * stride_mask_r
    accumulated = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for begin in range(0, count * SIZE, BLOCK_N):
        s, valid = chosen_keys(chosen, begin + tl.arange(0, BLOCK_N), count, S, stride_indices_k, SIZE)
        wide_s = s.to(tl.int64)
        k = tl.load(
            keys + wide_s[:, None] * stride_key_s + d[None, :] * stride_key_d,
            mask=valid[:, None] & (d < D)[None, :],
            other=0.0,
        )  # (BLOCK_N, BLOCK_D)
        if BLOCK_K == 0:
            v = tl.load(
                values + wide_s[:, None] * stride_value_s + e[None, :] * stride_value_e,
                mask=valid[:, None] & (e < E)[None, :],
                other=0.0,
            )  # (BLOCK_N, BLOCK_E)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
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
            dp = products(
                gradients,
                values + wide_s * stride_value_s,
                inside,
                valid,
                E,
                stride_doutput_e,
                stride_value_e,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                PRECISION,
            )
        sees = visible(
            inside[:, None] & valid[None, :],
            (row + position)[:, None],
            s[None, :],
            mask,
            of_row[:, None],
            window,
            stride_mask_s,
            IS_CAUSAL,
            HAS_WINDOW,
        )
        p = tl.exp(tl.where(sees, scores * SCALE, NONE) - shift[:, None])  # (BLOCK_M, BLOCK_N)
        ds = p * (dp - own_delta[:, None])
        accumulated = tl.dot(ds.to(k.dtype), k, accumulated, input_precision=PRECISION)
    at = dquery + place[:, None] * D + d[None, :]
    tl.store(at, (accumulated * SCALE).to(dquery.dtype.element_ty), mask=in_d)


@triton.jit(do_not_specialize=["FIRST", "position", "window"])
def key_kernel(
    doutput,
    query,
    key,
    value,
    mask,
    logsumexp,
    delta,
    order,
    begins,
    dkey,
    dvalue,
    FIRST,
    CHOSEN,
    KV,
    R,
    S,
    L,
    K,
    position,
    window,
    stride_doutput_b,
    stride_doutput_h,
    stride_doutput_r,
    stride_doutput_e,
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
    stride_mask_b,
    stride_mask_h,
    stride_mask_r,
    stride_mask_s,
    stride_logsumexp_b,
    stride_logsumexp_h,
    stride_logsumexp_r,
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
):
    """Adds to dkey (B, kv, S, D) and dvalue (B, kv, S, E) of BLOCK_N keys of one block what a chunk's queries give.

    order (B * kv, CHOSEN): the places of the chunk's sorted indices, K for each query block from FIRST on; begins
    (B * kv, L + 1): where in it those of a key block begin.
    """
    tiles = tl.cdiv(SIZE, BLOCK_N)
    block, group = (tl.program_id(0) // tiles % L).to(tl.int64), tl.program_id(0) // tiles // L
    b, g = (group // KV).to(tl.int64), (group % KV).to(tl.int64)
    group = group.to(tl.int64)
    in_block = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    s = block * SIZE + in_block
    valid = (in_block < SIZE) & (s < S)
    d, e = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, BLOCK_E).to(tl.int64)
    in_d, in_e = valid[:, None] & (d < D)[None, :], valid[:, None] & (e < E)[None, :]
    keys, values = key + b * stride_key_b + g * stride_key_h, value + b * stride_value_b + g * stride_value_h
    k = tl.load(keys + s[:, None] * stride_key_s + d[None, :] * stride_key_d, mask=in_d, other=0.0)
    v = tl.load(values + s[:, None] * stride_value_s + e[None, :] * stride_value_e, mask=in_e, other=0.0)
    first = tl.load(begins + group * (L + 1) + block)
    count = (tl.load(begins + group * (L + 1) + block + 1) - first).to(tl.int32)
    chosen_by = order + group * CHOSEN + first
    of_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    of_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for begin in range(0, count * G * SIZE, BLOCK_M):
        place = begin + tl.arange(0, BLOCK_M)
        exists = place < count * G * SIZE
        chosen = tl.load(chosen_by + place // (G * SIZE), mask=exists, other=0).to(tl.int32)
        row, head = (FIRST + chosen // K) * SIZE + place % SIZE, g * G + place % (G * SIZE) // SIZE
        inside = exists & (row < R)
        own = row + position
        row = row.to(tl.int64)
        rows = query + b * stride_query_b + head * stride_query_h + row * stride_query_r
        q = tl.load(
            rows[:, None] + d[None, :] * stride_query_d, mask=inside[:, None] & (d < D)[None, :], other=0.0
        )  # (BLOCK_M, BLOCK_D)
        rows = doutput + b * stride_doutput_b + head * stride_doutput_h + row * stride_doutput_r
        dy = tl.load(rows[:, None] + e[None, :] * stride_doutput_e, mask=inside[:, None] & (e < E)[None, :], other=0.0)
        at = logsumexp + b * stride_logsumexp_b + head * stride_logsumexp_h + row * stride_logsumexp_r
        shift = tl.load(at, mask=inside, other=0.0)
        shift = tl.where(shift == NONE, 0.0, shift)
        own_delta = tl.load(delta + (b * KV * G + head) * R + row, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        sees = visible(
            valid[:, None] & inside[None, :],
            own[None, :],
            s[:, None],
            mask,
            (b * stride_mask_b + g * stride_mask_h + row * stride_mask_r)[None, :],
            window,
            stride_mask_s,
            IS_CAUSAL,
            HAS_WINDOW,
        )
        p = tl.exp(tl.where(sees, scores * SCALE, NONE) - shift[None, :])  # (BLOCK_N, BLOCK_M)
        of_v = tl.dot(p.to(dy.dtype), dy, of_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(dy), input_precision=PRECISION) - own_delta[None, :])
        of_k = tl.dot(ds.to(q.dtype), q, of_k, input_precision=PRECISION)
    at = dkey + (group * S + s)[:, None] * D + d[None, :]
    tl.store(at, tl.load(at, mask=in_d, other=0.0) + of_k * SCALE, mask=in_d)
    at = dvalue + (group * S + s)[:, None] * E + e[None, :]
    tl.store(at, tl.load(at, mask=in_e, other=0.0) + of_v, mask=in_e)


def launch(
    doutput: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> torch.Tensor:
    """`selected_attention_backward` on a GPU -> dquery (B, h, R, D); adds to dkey and dvalue."""
    given = doutput, query, key, value, indices, mask, output, logsumexp, dkey, dvalue
    if not has_kernel(query, value):
        return tiled.selected_attention_backward(*given, is_causal, window, position, block_size, scale)
    batch, heads, rows, features = query.shape
    groups, keys, width = value.shape[1:]
    blocks, kept = indices.shape[2:]
    dquery = query.new_empty(query.shape)
    if 0 in (batch, heads, rows):
        return dquery
    delta = torch.empty(logsumexp.shape, dtype=logsumexp.dtype, device=query.device)
    mask, of_mask = mask_and_strides(mask, (batch, groups, rows, keys))
    sizes = groups, rows, keys
    share, of_chosen = heads // groups, indices.stride()
    block_d, block_e = power_of_2(features), power_of_2(width)
    constants: dict[str, Any] = {"G": share, "D": features, "E": width, "SCALE": scale, "SIZE": block_size}
    constants |= {"IS_CAUSAL": is_causal, "HAS_WINDOW": window > 0, "PRECISION": precision(query.dtype)}
    constants |= {"BLOCK_D": block_d, "BLOCK_E": block_e}
    strides = (*doutput.stride(), *query.stride(), *key.stride(), *value.stride())
    block_m, block_n, warps, stages = query_tile(
        share * block_size, max(block_d, block_e), query.dtype, mask is not None
    )
    with torch.cuda.device_of(query):
        query_kernel[(batch * groups * blocks * triton.cdiv(share * block_size, block_m),)](
            *given[:8],
            dquery,
            delta,
            *(*sizes, blocks, kept, position, window),
            *(*strides, *of_chosen, *of_mask, *output.stride(), *logsumexp.stride()),
            **constants,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=step_of(query.dtype),
            num_warps=warps,
            num_stages=stages,
        )
    if 0 in (keys, kept):
        return dquery
    key_blocks, step = triton.cdiv(keys, block_size), chunk_blocks(indices)
    block_m, block_n, warps, stages = key_tile(block_size, max(block_d, block_e), query.dtype, mask is not None)
    for first in range(0, blocks, step):
        order, begins = by_key_block(indices[:, :, first : first + step], key_blocks)
        with torch.cuda.device_of(query):
            key_kernel[(batch * groups * key_blocks * triton.cdiv(block_size, block_n),)](
                *(doutput, query, key, value, mask, logsumexp, delta, order, begins, dkey, dvalue),
                *(first, order.shape[1], *sizes, key_blocks, kept, position, window),
                *(*strides, *of_mask, *logsumexp.stride()),
                **constants,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
        del order, begins
    return dquery


def by_key_block(indices: torch.Tensor, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, kv, n, K) -> places in n * K, by key block and by query block in each, (B * kv, n * K) int64; and where in
    them each of L blocks begins, (B * kv, L + 1) int64. Those of -1 come before all.
    """
    chosen, order = indices.flatten(2).flatten(0, 1).sort(dim=-1, stable=True)
    numbers = torch.arange(key_blocks + 1, dtype=torch.int32, device=indices.device)
    return order, torch.searchsorted(chosen, numbers.expand(chosen.shape[0], -1).contiguous())


def workspace_bytes(
    doutput: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    mask: torch.Tensor | None,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> int:
    """The sums for each query, and of a chunk the indices, sorted ones, their places, and as much for sorting again."""
    given = doutput, query, key, value, indices, mask, output, logsumexp, dkey, dvalue
    if not has_kernel(query, value):
        return tiled.workspace_bytes(*given, is_causal, window, position, block_size, scale)
    batch, groups, blocks, kept = indices.shape
    chosen = batch * groups * min(blocks, chunk_blocks(indices)) * kept
    begins = 12 * batch * groups * (triton.cdiv(key.shape[2], block_size) + 1)
    return logsumexp.nbytes + (4 + 2 * (4 + 8)) * chosen + begins
