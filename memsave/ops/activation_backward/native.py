"""Calls the C++ kernel of `activation_backward`, csrc/activation_backward.cpp, where it measured faster."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

from torch import Tensor

from .._native import function, rows_bytes
from ..activation.kind import Activation
from ..activation.native import MATRIX, SHAPE, by_torch, matrices
from . import reference

_BY_TORCH = frozenset({Activation.SILU, Activation.GELU, Activation.RELU})
_kernel = function("ms_activation_backward", *SHAPE, c_int64, *MATRIX, *MATRIX, c_void_p)


def launch(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    if by_torch(x, kind, _BY_TORCH):
        return reference.activation_backward(dy, x, kind)
    _held, shape, (dy_rows, x_rows) = matrices(dy, x)
    dx = x.new_empty(x.shape)
    _kernel(*shape, kind, *dy_rows, *x_rows, dx.data_ptr())
    return dx


def workspace_bytes(dy: Tensor, x: Tensor, kind: int) -> int:
    if by_torch(x, kind, _BY_TORCH):
        return reference.workspace_bytes(dy, x, kind)
    return rows_bytes(dy) + rows_bytes(x)
