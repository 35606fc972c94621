"""Calls the C++ kernel of `pack_bits`, csrc/pack_bits.cpp."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import function

_kernel = function("ms_pack_bits", c_void_p, c_int64, c_int64, c_void_p)  # mask, its shape, bits


def launch(mask: Tensor) -> Tensor:
    n, d = mask.shape
    mask = mask.contiguous()
    bits = mask.new_empty((n, (d + 7) // 8), dtype=torch.uint8)
    _kernel(mask.data_ptr(), n, d, bits.data_ptr())
    return bits


def workspace_bytes(mask: Tensor) -> int:
    return 0 if mask.is_contiguous() else mask.numel()
