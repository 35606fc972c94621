"""Calls the C++ kernel of `masked_scale`, csrc/masked_scale.cpp."""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

from torch import Tensor

from .._native import DTYPE_CODES, function

_kernel = function(
    "ms_masked_scale",
    *(c_void_p, c_int64, c_int64, c_int64),  # x: address, dtype, shape
    *(c_void_p, c_double, c_void_p),  # bits, scale, y
)


def launch(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    x, bits = x.contiguous(), bits.contiguous()
    y = x.new_empty(x.shape)
    _kernel(x.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, bits.data_ptr(), scale, y.data_ptr())
    return y


def workspace_bytes(x: Tensor, bits: Tensor, scale: float) -> int:
    return sum(tensor.nbytes for tensor in (x, bits) if not tensor.is_contiguous())
