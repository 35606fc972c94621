"""The weight gradient of a linear layer from k of its N rows.

N rows, k kept rows, D input and O output features. dW = dy^T x is a sum over rows; this is its weighted part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "sampled_matmul(Tensor dy, Tensor kept, Tensor rows, Tensor scale) -> Tensor",
    fake=lambda dy, kept, rows, scale: dy.new_empty((dy.shape[1], kept.shape[1])),
    reference=reference,
    kernels=("native", "triton"),
)


def sampled_matmul(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """dW = sum over r of scale[r] * dy[rows[r]]^T kept[r], accumulated at least in float32.

    Args:
        dy: (N, O) floating point, any strides: the gradient of all rows.
        kept: (k, D) dtype of dy: the inputs of the kept rows.
        rows: (k,) int32 in [0, N): which rows were kept; repetitions allowed.
        scale: (k,) float32: the weight of each.

    Returns:
        (O, D), contiguous, dtype of dy.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices.
        IndexError: a row outside [0, N), on the CPU.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("dy", dy, 2)
    _check.typed("kept", kept, dy.dtype, 2)
    _check.typed("rows", rows, torch.int32, 1)
    _check.typed("scale", scale, torch.float32, 1)
    _check.length("kept", kept, rows.shape[0], "rows kept")
    _check.length("scale", scale, rows.shape[0], "rows kept")
    _check.same_device(dy=dy, kept=kept, rows=rows, scale=scale)
    return _op(dy, kept, rows, scale)
