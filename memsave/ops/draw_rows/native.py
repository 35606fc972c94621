"""Calls the C++ kernel of `draw_rows`, csrc/draw_rows.cpp."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import function

_kernel = function("ms_draw_rows", c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p)
_scratch_bytes = function("ms_draw_rows_scratch_bytes", c_int64)


def launch(q: Tensor, k: int, seed: Tensor) -> Tensor:
    rows = q.new_empty(k, dtype=torch.int32)
    scratch = q.new_empty(_scratch_bytes(q.numel()), dtype=torch.uint8)
    address = scratch.data_ptr()
    found = _kernel(q.data_ptr(), q.numel(), q.stride(0), k, int(seed), address, rows.data_ptr())
    if found < k:
        raise IndexError(f"q gives {found} rows, not k = {k}: it must sum to k * 2^32, as that of row_inclusion does.")
    return rows


def workspace_bytes(q: Tensor, k: int, seed: Tensor) -> int:
    return _scratch_bytes(q.numel())
