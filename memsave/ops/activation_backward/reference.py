"""Plain PyTorch implementation of `activation_backward`: torch's own operators, and a composite where torch has none.

N rows, F features. It takes tensors of any number of dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activation.kind import QUICK_GELU_SCALE, Activation
from ..activation.reference import approximation, row_major, row_major_bytes, wide_dtype

aten = torch.ops.aten


def activation_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    dy, x = row_major(dy), row_major(x)
    if kind == Activation.SILU:
        return aten.silu_backward(dy, x)
    if kind in (Activation.GELU, Activation.GELU_TANH):
        return aten.gelu_backward(dy, x, approximate=approximation(kind))
    if kind == Activation.MISH:
        return aten.mish_backward(dy, x)
    if kind == Activation.RELU:
        return aten.threshold_backward(dy, x, 0)
    if kind == Activation.RELU_SQUARED:
        return aten.threshold_backward(x.mul(2).mul_(dy), x, 0)
    wide = x.to(wide_dtype(x.dtype))
    sigmoid = (wide * QUICK_GELU_SCALE).sigmoid_()
    # s + 1.702 x s (1 - s)
    slope = (1 - sigmoid).mul_(wide).mul_(QUICK_GELU_SCALE).add_(1).mul_(sigmoid)
    return slope.mul_(dy).to(x.dtype)


def workspace_bytes(dy: Tensor, x: Tensor, kind: int) -> int:
    """Copies in rows and, for composites, their terms."""
    copies = row_major_bytes(dy) + row_major_bytes(x)
    if kind == Activation.RELU_SQUARED:
        return copies + x.numel() * x.element_size()
    if kind == Activation.QUICK_GELU:
        return copies + x.numel() * (3 * 4 if x.element_size() < 4 else x.element_size())
    return copies
