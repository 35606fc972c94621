"""Triton kernel of `logit_statistics_backward`: one program for each block of a row, which it reads and writes once.

Shapes: logits (C, V), everything else (C,).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..logit_statistics.triton import tanh_of

BLOCK, WARPS = 4096, 8


@triton.jit
def gradient_kernel(
    logits,
    target,
    peak,
    log_sum,
    d_lse,
    d_target,
    d_total,
    V,
    stride_n,
    stride_v,
    stride_target,
    stride_peak,
    stride_log_sum,
    stride_d_lse,
    stride_d_target,
    stride_d_total,
    SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row becomes its gradient. SOFTCAP, 0 for none, is a constant: a float argument would be rounded."""
    r = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = v < V
    places = logits + r * stride_n + v * stride_v
    z = tl.load(places, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
    slope = tl.full([BLOCK], 1.0, WIDE)
    if SOFTCAP > 0:
        cap = tl.full([], SOFTCAP, WIDE)
        tanh = tanh_of(z / cap)
        z = cap * tanh
        slope = 1.0 - tanh * tanh
    share = tl.exp(z - tl.load(peak + r * stride_peak) - tl.load(log_sum + r * stride_log_sum))
    gradient = share * tl.load(d_lse + r * stride_d_lse) + tl.load(d_total + r * stride_d_total)
    hit = v == tl.load(target + r * stride_target)
    gradient += tl.where(hit, tl.load(d_target + r * stride_d_target), 0.0)
    tl.store(places, (gradient * slope).to(logits.dtype.element_ty), mask=inside)


def launch(
    logits: torch.Tensor,
    target: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    d_lse: torch.Tensor,
    d_target: torch.Tensor,
    d_total: torch.Tensor,
    softcap: float | None,
) -> None:
    """`logit_statistics_backward` on a GPU: logits (C, V), everything else (C,)."""
    if logits.numel() == 0:
        return
    n, classes = logits.shape
    numbers = (target, peak, log_sum, d_lse, d_target, d_total)
    with torch.cuda.device_of(logits):
        gradient_kernel[(n, triton.cdiv(classes, BLOCK))](
            logits,
            *numbers,
            classes,
            *logits.stride(),
            *(tensor.stride(0) for tensor in numbers),
            SOFTCAP=softcap or 0.0,
            WIDE=tl.float64 if peak.dtype == torch.float64 else tl.float32,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def workspace_bytes(
    logits: torch.Tensor,
    target: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    d_lse: torch.Tensor,
    d_target: torch.Tensor,
    d_total: torch.Tensor,
    softcap: float | None,
) -> int:
    return 0
