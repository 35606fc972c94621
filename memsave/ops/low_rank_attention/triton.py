"""Triton kernels of `low_rank_attention`: keys are rebuilt on chip, tile by tile, and never written to memory.

B sequences, h query and kv key/value heads, G = h / kv, T queries, S keys, head size D, ranks Rk and Rv. The T * G
query rows of one key/value head are numbered t * G + (head in the group); a program takes BLOCK_M of them and goes over
the keys of its slice. A head is held as two halves, so that rotating needs no exchange: D = 40 is 20 + 20, each padded
to 32. What a program accumulates for a row has W numbers: Rv latents, or D where rebuilding the values is cheaper or so
many latents do not fit on chip.

With few rows the keys are split into slices. Their peaks, sums and accumulators are combined by a second kernel, always
in the same order and without atomics. Products take the dtype of the query and are accumulated in float32.

float64, D > 256, ranks of 0 and more than a million rows have no kernel: plain PyTorch serves them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from . import tiled
from .sizes import Sizes, sizes
from .tiles import KERNEL_DTYPES, MAX_D, MAX_ROWS, Tile, precision, slice_keys, tile_of
from .triton_on_chip import finish, rebuilt, rebuilt_halves

NONE = tl.constexpr(float("-inf"))


@triton.jit
def attention_kernel(
    query,
    key_latent,
    key_factor,
    key_bias,
    value_latent,
    value_factor,
    value_bias,
    cos,
    sin,
    norm_weight,
    mask,
    out,
    peaks,
    totals,
    sums,
    KV,
    T,
    S,
    RK,
    RV,
    slice_keys,
    stride_query_b,
    stride_query_h,
    stride_query_t,
    stride_query_d,
    stride_key_latent_b,
    stride_key_latent_s,
    stride_key_latent_r,
    stride_key_factor_d,
    stride_key_factor_r,
    stride_key_bias,
    stride_value_latent_b,
    stride_value_latent_s,
    stride_value_latent_r,
    stride_value_factor_d,
    stride_value_factor_r,
    stride_value_bias,
    stride_cos_b,
    stride_cos_s,
    stride_cos_d,
    stride_sin_b,
    stride_sin_s,
    stride_sin_d,
    stride_norm,
    stride_mask_b,
    stride_mask_h,
    stride_mask_t,
    stride_mask_s,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    MASK_IS_BOOL: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    IN_RANK_SPACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows of one key/value head over one slice of the keys: to out, or with `sums` what the slice gives."""
    group = tl.program_id(0).to(tl.int64)
    b, g = group // KV, group % KV
    r = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < T * G
    t, head = r // G, g * G + r % G
    low = tl.arange(0, BLOCK_H).to(tl.int64)
    half = (D + 1) // 2
    high = low + half
    in_low, in_high = low < half, high < D
    rows = query + b * stride_query_b + head * stride_query_h + t * stride_query_t
    q_low = tl.load(
        rows[:, None] + low[None, :] * stride_query_d, mask=inside[:, None] & in_low[None, :], other=0.0
    )  # (BLOCK_M, BLOCK_H)
    q_high = tl.load(rows[:, None] + high[None, :] * stride_query_d, mask=inside[:, None] & in_high[None, :], other=0.0)
    factor_low = key_factor + (g * D + low) * stride_key_factor_d
    factor_high = key_factor + (g * D + high) * stride_key_factor_d
    w = tl.arange(0, BLOCK_W).to(tl.int64)
    first = tl.program_id(2).to(tl.int64) * slice_keys
    last = tl.minimum(first + slice_keys, S)
    if IS_CAUSAL:  # what the last row of this tile sees
        bottom = tl.minimum(tl.program_id(1).to(tl.int64) * BLOCK_M + BLOCK_M, T * G) - 1
        last = tl.minimum(last, bottom // G + S - T + 1)
    peak = tl.full((BLOCK_M,), NONE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for begin in range(first, last, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        valid = n < last
        k_low, k_high = rebuilt_halves(
            key_latent + b * stride_key_latent_b + n * stride_key_latent_s,
            factor_low,
            factor_high,
            valid,
            in_low,
            in_high,
            RK,
            stride_key_latent_r,
            stride_key_factor_r,
            BLOCK_N,
            BLOCK_H,
            BLOCK_R,
            PRECISION,
        )
        if key_bias is not None:  # of the key/value head, which several query heads share
            places = key_bias + (g * D + low) * stride_key_bias
            k_low += tl.load(places, mask=in_low, other=0.0).to(tl.float32)[None, :]
            k_high += tl.load(places + half * stride_key_bias, mask=in_high, other=0.0).to(tl.float32)[None, :]
        if norm_weight is not None:
            squares = tl.sum(k_low * k_low, 1) + tl.sum(k_high * k_high, 1)
            root = (1.0 / tl.sqrt(squares / D + EPS))[:, None]
            k_low *= root * tl.load(norm_weight + low * stride_norm, mask=in_low, other=0.0).to(tl.float32)[None, :]
            k_high *= root * tl.load(norm_weight + high * stride_norm, mask=in_high, other=0.0).to(tl.float32)[None, :]
        if cos is not None:
            turned = valid[:, None] & in_low[None, :]
            at = cos + b * stride_cos_b + n[:, None] * stride_cos_s + low[None, :] * stride_cos_d
            new_low = k_low * tl.load(at, mask=turned, other=0.0).to(tl.float32)
            new_high = k_high * tl.load(at + half * stride_cos_d, mask=turned, other=0.0).to(tl.float32)
            at = sin + b * stride_sin_b + n[:, None] * stride_sin_s + low[None, :] * stride_sin_d
            new_low -= k_high * tl.load(at, mask=turned, other=0.0).to(tl.float32)
            new_high += k_low * tl.load(at + half * stride_sin_d, mask=turned, other=0.0).to(tl.float32)
            k_low, k_high = new_low, new_high
        scores = tl.dot(q_low, tl.trans(k_low.to(q_low.dtype)), input_precision=PRECISION)
        scores = tl.dot(q_high, tl.trans(k_high.to(q_low.dtype)), scores, input_precision=PRECISION) * SCALE
        sees = inside[:, None] & valid[None, :]
        if IS_CAUSAL:
            sees = sees & (n[None, :] <= t[:, None] + (S - T))
        if mask is not None:
            place = mask + b * stride_mask_b + head[:, None] * stride_mask_h + t[:, None] * stride_mask_t
            given = tl.load(place + n[None, :] * stride_mask_s, mask=sees, other=0)
            if MASK_IS_BOOL:
                sees = sees & (given != 0)
            else:
                scores += given.to(tl.float32)
        scores = tl.where(sees, scores, NONE)  # (BLOCK_M, BLOCK_N)
        before = peak
        peak = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(peak == NONE, 0.0, peak)
        decay = tl.exp(before - shift)
        exponentials = tl.exp(scores - shift[:, None])
        total = total * decay + tl.sum(exponentials, 1)
        latent = value_latent + b * stride_value_latent_b + n * stride_value_latent_s
        if IN_RANK_SPACE:
            along = latent[:, None] + w[None, :] * stride_value_latent_r
            values = tl.load(along, mask=valid[:, None] & (w < RV)[None, :], other=0.0)  # (BLOCK_N, BLOCK_W)
        else:
            values = rebuilt(
                latent,
                value_factor + (g * D + w) * stride_value_factor_d,
                valid,
                w < D,
                RV,
                stride_value_latent_r,
                stride_value_factor_r,
                BLOCK_N,
                BLOCK_W,
                BLOCK_R,
                PRECISION,
            ).to(q_low.dtype)
        accumulated = accumulated * decay[:, None]
        accumulated = tl.dot(exponentials.to(q_low.dtype), values, accumulated, input_precision=PRECISION)
    if sums is None:
        finish(
            accumulated,
            total,
            value_factor,
            value_bias,
            out,
            b,
            g,
            r,
            KV,
            T,
            RV,
            stride_value_factor_d,
            stride_value_factor_r,
            stride_value_bias,
            G,
            D,
            IN_RANK_SPACE,
            PRECISION,
            BLOCK_W,
            BLOCK_D,
        )
    else:
        place = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + group) * T * G + r
        tl.store(peaks + place, peak, mask=inside)
        tl.store(totals + place, total, mask=inside)
        tl.store(sums + place[:, None] * BLOCK_W + w[None, :], accumulated, mask=inside[:, None])


@triton.jit
def combine_kernel(
    value_factor,
    value_bias,
    out,
    peaks,
    totals,
    sums,
    KV,
    T,
    RV,
    slices,
    stride_value_factor_d,
    stride_value_factor_r,
    stride_value_bias,
    G: tl.constexpr,
    D: tl.constexpr,
    IN_RANK_SPACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The slices of BLOCK_M rows, in their order, to out."""
    group = tl.program_id(0).to(tl.int64)
    r = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = r < T * G
    w = tl.arange(0, BLOCK_W).to(tl.int64)
    peak = tl.full((BLOCK_M,), NONE, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for z in range(0, slices):
        place = (tl.full([], z, tl.int64) * tl.num_programs(0) + group) * T * G + r
        of_slice = tl.load(peaks + place, mask=inside, other=NONE)
        before = peak
        peak = tl.maximum(peak, of_slice)
        shift = tl.where(peak == NONE, 0.0, peak)
        decay, weight = tl.exp(before - shift), tl.exp(of_slice - shift)
        total = total * decay + tl.load(totals + place, mask=inside, other=0.0) * weight
        added = tl.load(sums + place[:, None] * BLOCK_W + w[None, :], mask=inside[:, None], other=0.0)
        accumulated = accumulated * decay[:, None] + added * weight[:, None]
    finish(
        accumulated,
        total,
        value_factor,
        value_bias,
        out,
        group // KV,
        group % KV,
        r,
        KV,
        T,
        RV,
        stride_value_factor_d,
        stride_value_factor_r,
        stride_value_bias,
        G,
        D,
        IN_RANK_SPACE,
        PRECISION,
        BLOCK_W,
        BLOCK_D,
    )


def has_kernel(size: Sizes, dtype: torch.dtype) -> bool:
    rows = size.T * size.group  # a grid has at most 65,535 tiles of them
    return dtype in KERNEL_DTYPES and size.D <= MAX_D and min(size.Rk, size.Rv) > 0 and rows <= MAX_ROWS


def strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Of a tensor that may be missing; 0 along a first dimension of size 1, which all sequences share."""
    if tensor is None:
        return (0,) * dims
    first, *rest = tensor.stride()
    return (0 if dims > 2 and tensor.shape[0] == 1 else first, *rest)


def launch(
    query: torch.Tensor,
    key_latent: torch.Tensor,
    key_factor: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_latent: torch.Tensor,
    value_factor: torch.Tensor,
    value_bias: torch.Tensor | None,
    scale: float,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    mask: torch.Tensor | None,
    is_causal: bool,
) -> torch.Tensor:
    """`low_rank_attention` on a GPU -> (B, T, h, D) in the dtype of query."""
    size, dtype = sizes(query, key_latent, key_factor, value_latent), query.dtype
    factors = key_latent, key_factor, key_bias, value_latent, value_factor, value_bias
    rest = cos, sin, norm_weight
    if not has_kernel(size, dtype):
        return tiled.low_rank_attention(query, *factors, scale, *rest, norm_eps, mask, is_causal)
    if not query.numel() or not size.S:
        return query.new_zeros((size.B, size.T, size.h, size.D))
    out = query.new_empty((size.B, size.T, size.h, size.D))
    tile = tile_of(size, dtype)
    keys = slice_keys(size, tile)
    slices = triton.cdiv(size.S, keys)
    peaks, totals, sums = partial(query, size, tile, slices)
    if mask is not None:
        mask = mask.expand(size.B, size.h, size.T, size.S)
    grid = size.B * size.kv, triton.cdiv(size.T * size.group, tile.block_m), slices
    with torch.cuda.device_of(query):
        attention_kernel[grid](
            query,
            *factors,
            *rest,
            mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask,
            out,
            peaks,
            totals,
            sums,
            *(size.kv, size.T, size.S, size.Rk, size.Rv, keys),
            *query.stride(),
            *key_latent.stride(),
            *key_factor.stride(),
            *strides(key_bias, 1),
            *value_latent.stride(),
            *value_factor.stride(),
            *strides(value_bias, 1),
            *strides(cos, 3),
            *strides(sin, 3),
            *strides(norm_weight, 1),
            *strides(mask, 4),
            G=size.group,
            D=size.D,
            SCALE=scale,
            EPS=norm_eps,
            MASK_IS_BOOL=mask is not None and mask.dtype == torch.bool,
            IS_CAUSAL=is_causal,
            PRECISION=precision(dtype),
            **tile.constants(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if sums is not None:
            combine(value_factor, value_bias, out, (peaks, totals, sums), size, tile, slices)
    return out


def partial(
    query: torch.Tensor, size: Sizes, tile: Tile, slices: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """For each slice and row its peak, its sum of exponentials, and what it accumulates; nothing for one slice."""
    if slices == 1:
        return None, None, None
    rows = slices * size.B * size.h * size.T
    peaks, totals = (query.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return peaks, totals, query.new_empty((rows, tile.block_w), dtype=torch.float32)


def combine(
    value_factor: torch.Tensor,
    value_bias: torch.Tensor | None,
    out: torch.Tensor,
    of_slices: tuple[torch.Tensor | None, ...],
    size: Sizes,
    tile: Tile,
    slices: int,
) -> None:
    constants = {name: value for name, value in tile.constants().items() if name in combine_kernel.arg_names}
    combine_kernel[size.B * size.kv, triton.cdiv(size.T * size.group, tile.block_m)](
        value_factor,
        value_bias,
        out,
        *of_slices,
        *(size.kv, size.T, size.Rv, slices),
        *value_factor.stride(),
        *strides(value_bias, 1),
        G=size.group,
        D=size.D,
        PRECISION=precision(out.dtype),
        **constants,
        num_warps=tile.warps,
    )


def workspace_bytes(
    query: torch.Tensor,
    key_latent: torch.Tensor,
    key_factor: torch.Tensor,
    key_bias: torch.Tensor | None,
    value_latent: torch.Tensor,
    *rest: Any,
) -> int:
    """What the slices give, where there are several: float32 numbers for each row."""
    size = sizes(query, key_latent, key_factor, value_latent)
    if not has_kernel(size, query.dtype):
        return tiled.workspace_bytes(query, key_latent, key_factor, key_bias, value_latent, *rest)
    if not query.numel() or not size.S:
        return 0
    tile = tile_of(size, query.dtype)
    slices = triton.cdiv(size.S, slice_keys(size, tile))
    return 0 if slices == 1 else 4 * slices * size.B * size.h * size.T * (2 + tile.block_w)
