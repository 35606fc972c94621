"""Triton kernel of `gated_activation`: a part of one row for each program.

Shapes: gate and up (N, F), result h (N, F).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..triton_activations import value_and_slope

MAX_BLOCK = 2048
WIDE_TYPES = {torch.float64: tl.float64}


@triton.jit
def product_kernel(
    gate,
    up,
    h,
    F,
    stride_gate_n,
    stride_gate_f,
    stride_up_n,
    stride_up_f,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = act(gate) * up; act(gate) is rounded to the type of h first, as plain PyTorch does."""
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    x = tl.load(gate + n * stride_gate_n + f * stride_gate_f, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
    factor = tl.load(up + n * stride_up_n + f * stride_up_f, mask=inside, other=0.0).to(WIDE)
    y, _ = value_and_slope(x, KIND)
    rounded = y.to(h.dtype.element_ty).to(WIDE)
    tl.store(h + n * F + f, (rounded * factor).to(h.dtype.element_ty), mask=inside)


def tile(features: int) -> int:
    """BLOCK for rows of `features` elements."""
    return min(max(triton.next_power_of_2(features), 16), MAX_BLOCK)


def launch(gate: torch.Tensor, up: torch.Tensor, kind: int) -> torch.Tensor:
    """`gated_activation` on a GPU: gate, up (N, F) -> h (N, F)."""
    n, features = gate.shape
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if h.numel() == 0:
        return h
    block = tile(features)
    with torch.cuda.device_of(gate):
        product_kernel[(n, triton.cdiv(features, block))](
            gate,
            up,
            h,
            features,
            *gate.stride(),
            *up.stride(),
            KIND=kind,
            WIDE=WIDE_TYPES.get(gate.dtype, tl.float32),
            BLOCK=block,
        )
    return h


def workspace_bytes(gate: torch.Tensor, up: torch.Tensor, kind: int) -> int:
    return 0
