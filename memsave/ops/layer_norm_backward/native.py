"""Calls the C++ kernel of `layer_norm_backward`, csrc/layer_norm_backward.cpp, for inputs in half types.

For float32 and float64 torch's own kernel is faster.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from ..rms_norm.native import scale_bytes, scale_of, widens_evenly
from ..rms_norm.style import HALF
from . import reference

_kernel = function(
    "ms_layer_norm_backward",
    *(c_void_p, c_int64, c_int64),  # dy: address, dtype, row stride
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # x: address, dtype, row stride, shape
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # rstd, scale, dx, dweight, dbias, scratch
)
_scratch_bytes = function("ms_layer_norm_backward_scratch_bytes", c_int64, c_int64)


def _serves(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None) -> bool:
    return x.dtype in HALF and rstd.dtype == torch.float32 and widens_evenly(rstd.dtype, dy, weight)


def launch(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not _serves(dy, x, rstd, weight):
        return reference.layer_norm_backward(dy, x, rstd, weight, needs_dweight, needs_dbias)
    scale, dy_rows, x_rows, statistics = scale_of(weight, rstd.dtype), rows_of(dy), rows_of(x), rstd.contiguous()
    dx, scratch = x.new_empty(x.shape), None
    dweight, dbias = (rstd.new_empty(x.shape[1] if needed else 0) for needed in (needs_dweight, needs_dbias))
    if needs_dweight or needs_dbias:
        scratch = x.new_empty(_scratch_bytes(*x.shape), dtype=torch.uint8)
    _kernel(
        *(dy_rows.data_ptr(), DTYPE_CODES[dy.dtype], dy_rows.stride(0)),
        *(x_rows.data_ptr(), DTYPE_CODES[x.dtype], x_rows.stride(0), *x.shape),
        *(statistics.data_ptr(), None if scale is None else scale.data_ptr(), dx.data_ptr()),
        *(dweight.data_ptr() if needs_dweight else None, dbias.data_ptr() if needs_dbias else None),
        None if scratch is None else scratch.data_ptr(),
    )
    return dx, dweight, dbias


def workspace_bytes(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> int:
    if not _serves(dy, x, rstd, weight):
        return reference.workspace_bytes(dy, x, rstd, weight, needs_dweight, needs_dbias)
    wide = rstd.dtype
    copies = rows_bytes(dy) + rows_bytes(x) + (0 if rstd.is_contiguous() else rstd.numel() * wide.itemsize)
    sums = _scratch_bytes(*x.shape) if needs_dweight or needs_dbias else 0
    return copies + scale_bytes(weight, wide) + sums
