"""Plain PyTorch implementation of `activation`: torch's own operators, and a composite where torch has none.

N rows, F features. It takes tensors of any number of dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kind import QUICK_GELU_SCALE, Activation


def activation(x: Tensor, kind: int) -> Tensor:
    rows = row_major(x)
    if kind == Activation.SILU:
        return F.silu(rows)
    if kind in (Activation.GELU, Activation.GELU_TANH):
        return F.gelu(rows, approximate=approximation(kind))
    if kind == Activation.MISH:
        return F.mish(rows)
    if kind == Activation.RELU:
        return F.relu(rows)
    if kind == Activation.RELU_SQUARED:
        return F.relu(rows).square_()
    wide = rows.to(wide_dtype(x.dtype))
    return (wide * QUICK_GELU_SCALE).sigmoid_().mul_(wide).to(x.dtype)


def approximation(kind: int) -> str:
    """What torch calls this kind of GELU."""
    return "tanh" if kind == Activation.GELU_TANH else "none"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What composites compute in: float32 for half types."""
    return torch.promote_types(dtype, torch.float32)


def row_major(x: Tensor) -> Tensor:
    """x, or a copy where torch's operators would give their output other strides than contiguous ones."""
    rows = x.dim() == 2 and x.stride(1) == 1 and x.stride(0) >= x.shape[1]
    return x if rows else x.contiguous()


def row_major_bytes(x: Tensor) -> int:
    """What `row_major` allocates for x (N, F)."""
    copied = not x.is_contiguous() and (x.stride(1) != 1 or x.stride(0) < x.shape[1])
    return x.numel() * x.element_size() if copied else 0


def workspace_bytes(x: Tensor, kind: int) -> int:
    """A copy in rows; for QUICK_GELU of half types, two in float32."""
    wide = 2 * x.numel() * 4 if kind == Activation.QUICK_GELU and x.element_size() < 4 else 0
    return row_major_bytes(x) + wide
