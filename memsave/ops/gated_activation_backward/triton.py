"""Triton kernel of `gated_activation_backward`: a part of one row for each program.

Shapes: dh, gate and up (N, F), results dgate and dup (N, F).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..gated_activation.triton import WIDE_TYPES, tile
from ..triton_activations import RELU, RELU_SQUARED, value_and_slope


@triton.jit
def gradients_kernel(
    dh,
    gate,
    up,
    dgate,
    dup,
    F,
    stride_dh_n,
    stride_dh_f,
    stride_gate_n,
    stride_gate_f,
    stride_up_n,
    stride_up_f,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dh * up * act'(gate), dup = dh * act(gate)."""
    n = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = f < F
    upstream = tl.load(dh + n * stride_dh_n + f * stride_dh_f, mask=inside, other=0.0).to(WIDE)  # (BLOCK,)
    x = tl.load(gate + n * stride_gate_n + f * stride_gate_f, mask=inside, other=0.0).to(WIDE)
    factor = tl.load(up + n * stride_up_n + f * stride_up_f, mask=inside, other=0.0).to(WIDE)
    y, slope = value_and_slope(x, KIND)
    dx = upstream * factor * slope
    if KIND == RELU or KIND == RELU_SQUARED:  # where it is flat nothing passes, not even an infinity
        dx = tl.where(x <= 0, 0.0, dx)
    tl.store(dgate + n * F + f, dx.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + n * F + f, (upstream * y).to(dup.dtype.element_ty), mask=inside)


def launch(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`gated_activation_backward` on a GPU: dh, gate, up (N, F) -> dgate, dup (N, F)."""
    n, features = gate.shape
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel() == 0:
        return dgate, dup
    block = tile(features)
    with torch.cuda.device_of(gate):
        gradients_kernel[(n, triton.cdiv(features, block))](
            dh,
            gate,
            up,
            dgate,
            dup,
            features,
            *dh.stride(),
            *gate.stride(),
            *up.stride(),
            KIND=kind,
            WIDE=WIDE_TYPES.get(gate.dtype, tl.float32),
            BLOCK=block,
        )
    return dgate, dup


def workspace_bytes(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: int) -> int:
    return 0
