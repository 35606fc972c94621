"""Calls the C++ kernel of `row_inclusion`, csrc/row_inclusion.cpp."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function

_kernel = function("ms_row_inclusion", c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p)


def launch(weights: Tensor, k: int) -> Tensor:
    q = weights.new_empty(weights.shape, dtype=torch.int64)
    _kernel(weights.data_ptr(), DTYPE_CODES[weights.dtype], weights.numel(), weights.stride(0), k, q.data_ptr())
    return q


def workspace_bytes(weights: Tensor, k: int) -> int:
    return 0
