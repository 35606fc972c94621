"""What the Triton kernels of `low_rank_attention` share: keys and values rebuilt on chip, and results written.

kv key/value heads, G query heads for each, T queries, head size D, ranks RK and RV; a tile has BLOCK_M rows of queries
and BLOCK_N keys, and BLOCK_W numbers are accumulated for each row.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rebuilt_halves(
    latent,
    factor_low,
    factor_high,
    valid,
    in_low,
    in_high,
    RANK,
    stride_latent,
    stride_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """latent (n, RANK) times factor (D, RANK)^T, by pointers to their rows: twice (BLOCK_N, BLOCK_H) float32."""
    low = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    high = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = rank < RANK
        x = tl.load(latent[:, None] + rank[None, :] * stride_latent, mask=valid[:, None] & inside[None, :], other=0.0)
        along = rank[:, None] * stride_factor
        of_low = tl.load(factor_low[None, :] + along, mask=inside[:, None] & in_low[None, :], other=0.0)
        of_high = tl.load(factor_high[None, :] + along, mask=inside[:, None] & in_high[None, :], other=0.0)
        low = tl.dot(x, of_low, low, input_precision=PRECISION)
        high = tl.dot(x, of_high, high, input_precision=PRECISION)
    return low, high


@triton.jit
def rebuilt(
    latent,
    factor,
    valid,
    wanted,
    RANK,
    stride_latent,
    stride_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same in one piece: (BLOCK_N, BLOCK_W) float32."""
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R).to(tl.int64)
        inside = rank < RANK
        x = tl.load(latent[:, None] + rank[None, :] * stride_latent, mask=valid[:, None] & inside[None, :], other=0.0)
        along = factor[None, :] + rank[:, None] * stride_factor
        of_values = tl.load(along, mask=inside[:, None] & wanted[None, :], other=0.0)
        total = tl.dot(x, of_values, total, input_precision=PRECISION)
    return total


@triton.jit
def store(values, seen, value_bias, out, row, d, g, inside, stride_value_bias, D: tl.constexpr):
    """Results for features d of rows that start at `row` in out; the bias only where some key was seen."""
    if value_bias is not None:
        bias = tl.load(value_bias + (g * D + d) * stride_value_bias, mask=d < D, other=0.0).to(tl.float32)
        values += tl.where(seen[:, None], bias[None, :], 0.0)
    tl.store(out + row[:, None] + d[None, :], values.to(out.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def finish(
    sums,
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
    G: tl.constexpr,
    D: tl.constexpr,
    IN_RANK_SPACE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, t, head] from the accumulators (BLOCK_M, BLOCK_W) and sums of exponentials (BLOCK_M,) of rows r."""
    seen = total > 0
    values = sums / tl.where(seen, total, 1.0)[:, None]
    inside = r < T * G
    row = ((b * T + r // G) * KV * G + g * G + r % G) * D
    w = tl.arange(0, BLOCK_W).to(tl.int64)
    if IN_RANK_SPACE:
        dtype: tl.constexpr = value_factor.dtype.element_ty
        rounded = values.to(dtype)
        rest = (values - rounded.to(tl.float32)).to(dtype)  # with it, latents in half types are as good as in float32
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D).to(tl.int64)
            along = tl.minimum(w, RV - 1)[:, None] * stride_value_factor_r  # latents behind the last are zero
            places = value_factor + (g * D + d)[None, :] * stride_value_factor_d + along
            factor = tl.load(places, mask=(d < D)[None, :], other=0.0)  # (BLOCK_W, BLOCK_D)
            result = tl.dot(rounded, factor, input_precision=PRECISION)
            if dtype != tl.float32:
                result = tl.dot(rest, factor, result)
            store(result, seen, value_bias, out, row, d, g, inside, stride_value_bias, D)
    else:
        store(values, seen, value_bias, out, row, w, g, inside, stride_value_bias, D)
