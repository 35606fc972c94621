"""Triton kernels of `row_inclusion`: everything elementwise, fused between the sort and the two cumulative sums.

All decisions are taken on integers and on IEEE float64 quotients and products (no sum that could become an FMA), so the
result equals the reference bit for bit. Nothing is read back by the host.

Shapes: weights (N,), result q (N,) int64 in [1, 2^32] with sum k * 2^32. Notation: m are the weights as integers in
[1, 2^30 + 1], c the number of rows capped at probability one, ONE = 2^32 the fixed-point probability one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
ONE = tl.constexpr(2**32)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# A Python float in a kernel may be rounded to float32, which would make this 1.0: it is used through `tl.full` only.
SHRINK = tl.constexpr(1 - 2**-50)


@triton.jit
def sanitize(weight):
    """The weight as float64 in [0, LARGEST]; nan counts as LARGEST."""
    weight = weight.to(tl.float64)
    weight = tl.where((weight != weight) | (weight > LARGEST), LARGEST, weight)
    return tl.where(weight < 0, 0.0, weight)


@triton.jit
def quantize_kernel(weights, stride, peak, quantized, N, BLOCK: tl.constexpr):
    """m[i] = 1 + floor(w[i] / max(w) * 2^30)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    weight = sanitize(tl.load(weights + i * stride, mask=i < N, other=0.0))
    largest = sanitize(tl.load(peak))
    share = weight / tl.where(largest > 0, largest, 1.0)
    tl.store(quantized + i, 1 + (share * 1073741824.0).to(tl.int64), mask=i < N)


@triton.jit
def is_capped(m, left, rest):
    """Whether a row of weight m would get probability 1 or more of `left` draws among rows of total weight `rest`."""
    return left * m >= rest


@triton.jit
def count_capped(ordered, sums, N, K, BLOCK: tl.constexpr):
    """The smallest c in [0, K - 1] at which the (c+1)-th largest row is not capped.

    `is_capped` is true for 0, ..., c - 1 and false from c on, so a search with BLOCK probes a round finds c.
    """
    total = tl.load(sums + N - 1)
    low = tl.full([], 0, tl.int64)
    high = tl.full([], 0, tl.int64) + K - 1
    while low < high:
        step = tl.cdiv(high - low, BLOCK)
        probe = low + tl.arange(0, BLOCK) * step
        m = tl.load(ordered + probe, mask=probe < high, other=0)
        rest = total - tl.load(sums + probe, mask=probe < high, other=0) + m
        found = tl.sum((is_capped(m, K - probe, rest) & (probe < high)).to(tl.int64))
        high = tl.minimum(low + found * step, high)
        low = tl.where(found > 0, low + (found - 1) * step + 1, low)
    return low


@triton.jit
def room_kernel(quantized, ordered, sums, room, N, K, BLOCK: tl.constexpr):
    """room[i] = ONE - q[i], before the remainder is handed out: 0 if capped, else q[i] is m[i]'s share rounded down."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    capped = count_capped(ordered, sums, N, K, BLOCK)
    left = K - capped
    rest = tl.load(sums + N - 1) - tl.load(sums + capped) + tl.load(ordered + capped)
    unit = (left * ONE - (N - capped)).to(tl.float64) / rest.to(tl.float64) * tl.full([], SHRINK, tl.float64)
    m = tl.load(quantized + i, mask=i < N, other=1)
    share = tl.minimum(m.to(tl.float64) * unit, 4294967296.0)
    q = tl.minimum(1 + share.to(tl.int64), ONE)
    tl.store(room + i, tl.where(is_capped(m, left, rest), 0, -q + ONE), mask=i < N)


@triton.jit
def fill_kernel(room, filled, q, N, K, BLOCK: tl.constexpr):
    """q[i] = ONE - room[i], and the remainder K * ONE - sum(q) poured into the rows in order while they have room."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = tl.load(room + i, mask=i < N, other=0)
    room_before = tl.load(filled + i, mask=i < N, other=0) - here
    remainder = tl.load(filled + N - 1) - (tl.full([], 0, tl.int64) + N - K) * ONE
    added = tl.minimum(tl.maximum(remainder - room_before, 0), here)
    tl.store(q + i, added - here + ONE, mask=i < N)


def launch(weights: torch.Tensor, k: int) -> torch.Tensor:
    """`row_inclusion` on a GPU: weights (N,) and 1 <= k < N -> q (N,) int64 with sum k * 2^32; no host sync."""
    count = weights.shape[0]
    grid = (triton.cdiv(count, BLOCK),)
    with torch.cuda.device_of(weights):
        quantized = torch.empty(count, dtype=torch.int64, device=weights.device)
        quantize_kernel[grid](weights, weights.stride(0), weights.amax(), quantized, count, BLOCK=BLOCK)
        ordered = quantized.sort(descending=True).values
        room = torch.empty_like(quantized)
        room_kernel[grid](quantized, ordered, ordered.cumsum(0), room, count, k, BLOCK=BLOCK)
        q = torch.empty_like(quantized)
        fill_kernel[grid](room, room.cumsum(0), q, count, k, BLOCK=BLOCK)
    return q


def workspace_bytes(weights: torch.Tensor, k: int) -> int:
    """The integer weights, and what sorting takes: its two results and, as an estimate, scratch of the same size."""
    return 5 * 8 * weights.shape[0]
