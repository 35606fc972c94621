"""Calls the C++ kernel of `gated_activation`, csrc/gated_activation.cpp, where it measured faster."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

from torch import Tensor

from .._native import function, rows_bytes
from ..activation.kind import Activation
from ..activation.native import MATRIX, SHAPE, by_torch, matrices
from . import reference

_BY_TORCH = frozenset({Activation.GELU})
_kernel = function("ms_gated_activation", *SHAPE, c_int64, *MATRIX, *MATRIX, c_void_p)


def launch(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    if by_torch(gate, kind, _BY_TORCH):
        return reference.gated_activation(gate, up, kind)
    _held, shape, (gate_rows, up_rows) = matrices(gate, up)
    h = gate.new_empty(gate.shape)
    _kernel(*shape, kind, *gate_rows, *up_rows, h.data_ptr())
    return h


def workspace_bytes(gate: Tensor, up: Tensor, kind: int) -> int:
    if by_torch(gate, kind, _BY_TORCH):
        return reference.workspace_bytes(gate, up, kind)
    return rows_bytes(gate) + rows_bytes(up)
