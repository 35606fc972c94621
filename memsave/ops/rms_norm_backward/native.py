"""Calls the C++ kernel of `rms_norm_backward`, csrc/rms_norm_backward.cpp.

It computes in float32, or in float64 alone; plain PyTorch does the mixtures of float64 and other types.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from ..rms_norm.native import scale_bytes, scale_of, widens_evenly
from . import reference

_kernel = function(
    "ms_rms_norm_backward",
    *(c_void_p, c_int64, c_int64),  # dy: address, dtype, row stride
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # x: address, dtype, row stride, shape
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p),  # rstd, scale, dx, dweight, its dtype, scratch
)
_scratch_bytes = function("ms_rms_norm_backward_scratch_bytes", c_int64, c_int64, c_int64)


def launch(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    if not widens_evenly(rstd.dtype, dy, x, weight):
        return reference.rms_norm_backward(dy, x, rstd, weight, style, needs_dweight)
    scale, dy_rows, x_rows, statistics = scale_of(weight, rstd.dtype, style), rows_of(dy), rows_of(x), rstd.contiguous()
    dx, dweight, scratch = x.new_empty(x.shape), x.new_empty(0), None
    if weight is not None and needs_dweight:
        dweight = weight.new_empty(weight.shape)
        scratch = x.new_empty(_scratch_bytes(*x.shape, rstd.itemsize), dtype=torch.uint8)
    _kernel(
        *(dy_rows.data_ptr(), DTYPE_CODES[dy.dtype], dy_rows.stride(0)),
        *(x_rows.data_ptr(), DTYPE_CODES[x.dtype], x_rows.stride(0), *x.shape),
        *(statistics.data_ptr(), None if scale is None else scale.data_ptr(), dx.data_ptr()),
        *(dweight.data_ptr(), DTYPE_CODES[dweight.dtype], None if scratch is None else scratch.data_ptr()),
    )
    return dx, dweight


def workspace_bytes(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool) -> int:
    wide = rstd.dtype
    if not widens_evenly(wide, dy, x, weight):
        return reference.workspace_bytes(dy, x, rstd, weight, style, needs_dweight)
    copies = rows_bytes(dy) + rows_bytes(x) + (0 if rstd.is_contiguous() else rstd.numel() * wide.itemsize)
    sums = _scratch_bytes(*x.shape, wide.itemsize) if weight is not None and needs_dweight else 0
    return copies + scale_bytes(weight, wide, style) + sums
