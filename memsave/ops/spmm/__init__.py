"""The product of a dense matrix and a sparse one (SpMM), which is given by the flat positions of its entries.

N rows; S is (R, C) with K entries, sorted by position r * C + c. With x S^T it is what a sparse change of its weight
adds to a linear layer, with x S the gradient of that with respect to the layer's input. There is no Triton kernel: on a
GPU it is torch's own sparse product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..sddmm import MAX_ELEMENTS
from . import reference

_op = register(
    "spmm(Tensor x, Tensor values, Tensor indices, SymInt rows, SymInt columns, bool transposed) -> Tensor",
    fake=lambda x, values, indices, rows, columns, transposed: x.new_empty(
        (x.shape[0], rows if transposed else columns)
    ),
    reference=reference,
    kernels=("native",),
)


def spmm(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    """x S, or x S^T if `transposed`, accumulated at least in float32 and rounded once to the dtype of x.

    Args:
        x: (N, R), or (N, C) if transposed; floating point, any strides.
        values: (K,) floating point, of any dtype: the entries, converted to the dtype of the sums.
        indices: (K,) int32, strictly ascending positions r * C + c.
        rows, columns: R and C. R * C is at most 2^31 - 1.

    Returns:
        (N, C), or (N, R) if transposed; contiguous, dtype of x.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, a negative size, R * C above
            2^31 - 1.
        IndexError: an index outside [0, R * C) or not above the one before, on the CPU; on CUDA, undefined values.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    _check.floating("values", values, 1)
    _check.typed("indices", indices, torch.int32, 1)
    _check.length("values", values, indices.shape[0], "indices")
    _check.same_device(x=x, values=values, indices=indices)
    if rows < 0 or columns < 0 or rows * columns > MAX_ELEMENTS:
        raise ValueError(
            f"the matrix may have {MAX_ELEMENTS} elements at most, because indices are int32, and no negative size; "
            f"got {rows} x {columns}."
        )
    width = columns if transposed else rows
    if x.shape[1] != width:
        raise ValueError(f"x must have {width} columns for a {rows} x {columns} matrix; got shape {tuple(x.shape)}.")
    return _op(x, values, indices, rows, columns, transposed)
