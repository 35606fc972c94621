"""The product of a dense matrix and a sparse one, which is given by the flat positions of its entries.

N rows; S is (R, C) with K entries, sorted by position r * C + c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "spmm(Tensor x, Tensor values, Tensor indices, int rows, int columns, bool transposed) -> Tensor",
    fake=lambda x, values, indices, rows, columns, transposed: x.new_empty(
        (x.shape[0], rows if transposed else columns)
    ),
    reference=reference,
)


def spmm(x: Tensor, values: Tensor, indices: Tensor, shape: tuple[int, int], *, transposed: bool) -> Tensor:
    """x S, or x S^T if `transposed`, accumulated at least in float32 and rounded once to the dtype of x.

    Args:
        x: (N, R), or (N, C) if transposed; floating point, any strides.
        values: (K,) floating point: the entries.
        indices: (K,) int32, strictly ascending positions r * C + c.
        shape: (R, C).

    Returns:
        (N, C), or (N, R) if transposed; contiguous, dtype of x.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices.
        RuntimeError: an input requires grad while grad mode is on.
    """
    rows, columns = shape
    _check.floating("x", x, 2)
    _check.floating("values", values, 1)
    _check.typed("indices", indices, torch.int32, 1)
    _check.length("values", values, indices.shape[0], "indices")
    _check.same_device(x=x, values=values, indices=indices)
    width = columns if transposed else rows
    if x.shape[1] != width:
        raise ValueError(f"x must have {width} columns for a {rows} x {columns} matrix; got shape {tuple(x.shape)}.")
    return _op(x, values, indices, rows, columns, transposed)
