"""Calls the C++ kernel of `activation`, csrc/activation.cpp, where it measured faster than torch's own operators."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from . import reference
from .kind import Activation

# Torch's own operators are as fast here; besides, they give the very bits of the plain model.
_BY_TORCH = frozenset({Activation.SILU, Activation.GELU, Activation.RELU, Activation.RELU_SQUARED})
MATRIX = (c_void_p, c_int64)  # address, row stride
SHAPE = (c_int64, c_int64, c_int64)  # dtype, rows, columns
_kernel = function("ms_activation", *SHAPE, c_int64, *MATRIX, c_void_p)


def by_torch(x: Tensor, kind: int, kinds: frozenset[Activation]) -> bool:
    """Whether plain PyTorch serves: for these kinds, and for all but the types that are quick to convert to float32."""
    return kind in kinds or x.dtype not in (torch.float32, torch.bfloat16)


def matrices(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int], list[tuple[int, int]]]:
    """Tensors (N, F) of one dtype as the kernels take them: in rows, and as one long row if all are contiguous.

    Returns:
        The tensors, to be held during the call; dtype, rows and columns; address and row stride of each.
    """
    rows = tuple(map(rows_of, tensors))
    n, f = rows[0].shape
    shape = (1, n * f) if all(t.is_contiguous() for t in rows) else (n, f)
    return rows, (DTYPE_CODES[rows[0].dtype], *shape), [(t.data_ptr(), t.stride(0)) for t in rows]


def launch(x: Tensor, kind: int) -> Tensor:
    if by_torch(x, kind, _BY_TORCH):
        return reference.activation(x, kind)
    _held, shape, (x_rows,) = matrices(x)
    y = x.new_empty(x.shape)
    _kernel(*shape, kind, *x_rows, y.data_ptr())
    return y


def workspace_bytes(x: Tensor, kind: int) -> int:
    return reference.workspace_bytes(x, kind) if by_torch(x, kind, _BY_TORCH) else rows_bytes(x)
