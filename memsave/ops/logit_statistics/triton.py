"""Triton kernel of `logit_statistics`: one program for each row, which it reads once, block by block.

Shapes: logits (C, V), target (C,), results (C,). The sum of exponentials follows the largest value so far: what was
summed before is scaled when a larger one appears.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 4096, 8
NONE = tl.constexpr(float("-inf"))


@triton.jit
def tanh_of(x):
    """tanh by a continued fraction (Lambert) near zero, where e^x would cancel, and by e^x elsewhere."""
    square = x * x
    fraction = 15.0 + 0.0 * x
    for level in tl.static_range(7):
        fraction = (13.0 - 2.0 * level) + square / fraction
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, x / fraction, tl.where(x < 0, -large, large))


@triton.jit
def statistics_kernel(
    logits,
    target,
    peak,
    log_sum,
    at_target,
    total,
    V,
    stride_n,
    stride_v,
    stride_target,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The four numbers of one row. SOFTCAP, 0 for none, is a constant, because a float argument would be rounded."""
    r = tl.program_id(0).to(tl.int64)
    place = tl.load(target + r * stride_target)
    largest = tl.full([], NONE, WIDE)
    shift, found = tl.zeros([], WIDE), tl.zeros([], WIDE)
    exp_sum, z_sum = tl.zeros([], tl.float64), tl.zeros([], tl.float64)  # z of both signs cancel
    for start in range(0, V, BLOCK):
        v = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = v < V
        z = tl.load(logits + r * stride_n + v * stride_v, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
        if SOFTCAP > 0:
            cap = tl.full([], SOFTCAP, WIDE)
            z = cap * tanh_of(z / cap)
        largest = tl.maximum(largest, tl.max(tl.where(inside, z, NONE)))
        before = shift
        shift = tl.where(tl.abs(largest) == -NONE, tl.zeros([], WIDE), largest)
        exp_sum = tl.where(exp_sum == 0, exp_sum, exp_sum * tl.exp(before - shift).to(tl.float64))
        exp_sum += tl.sum(tl.where(inside, tl.exp(z - shift), 0.0)).to(tl.float64)
        z_sum += tl.sum(tl.where(inside, z, 0.0).to(tl.float64))
        found += tl.sum(tl.where(inside & (v == place), z, 0.0))
    tl.store(peak + r, shift)
    tl.store(log_sum + r, tl.log(exp_sum))
    tl.store(at_target + r, found)
    tl.store(total + r, z_sum)


def launch(
    logits: torch.Tensor, target: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logit_statistics` on a GPU: logits (C, V), target (C,) -> four times (C,)."""
    n, classes = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    peak, log_sum, at_target, total = (torch.empty(n, dtype=wide, device=logits.device) for _ in range(4))
    if n == 0:
        return peak, log_sum, at_target, total
    with torch.cuda.device_of(logits):
        statistics_kernel[(n,)](
            logits,
            target,
            peak,
            log_sum,
            at_target,
            total,
            classes,
            *logits.stride(),
            target.stride(0),
            SOFTCAP=softcap or 0.0,
            WIDE=tl.float64 if wide == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return peak, log_sum, at_target, total


def workspace_bytes(logits: torch.Tensor, target: torch.Tensor, softcap: float | None) -> int:
    return 0
