"""Copies rows of a matrix, each times a factor of its own, in one pass.

N rows, D features, k kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "gather_rows(Tensor x, Tensor rows, Tensor? scale) -> Tensor",
    fake=lambda x, rows, scale: x.new_empty((rows.shape[0], x.shape[1])),
    reference=reference,
    kernels=("native", "triton"),
)


def gather_rows(x: Tensor, rows: Tensor, scale: Tensor | None = None) -> Tensor:
    """out[r] = x[rows[r]] * scale[r], computed in float32 (float64 for float64 x) and rounded once to the dtype of x.

    Args:
        x: (N, D) floating point, any strides.
        rows: (k,) int32 in [0, N), repetitions allowed.
        scale: (k,) float32, or None for a plain copy.

    Returns:
        (k, D), contiguous, dtype of x.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices.
        IndexError: a row outside [0, N); on CUDA, PyTorch's own device assertion or undefined values.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    _check.typed("rows", rows, torch.int32, 1)
    if scale is not None:
        _check.typed("scale", scale, torch.float32, 1)
        _check.length("scale", scale, rows.shape[0], "rows kept")
    _check.same_device(x=x, rows=rows, scale=scale)
    return _op(x, rows, scale)
