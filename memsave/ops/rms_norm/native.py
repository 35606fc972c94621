"""Calls the C++ kernel of `rms_norm`, csrc/rms_norm.cpp.

It computes in float32, or in float64 alone; plain PyTorch does the mixtures of float64 and other types.
"""

from __future__ import annotations

import platform
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from . import reference
from .style import Style, output_dtype, rounded_dtype, statistic_dtype

_kernel = function(
    "ms_rms_norm",
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # x: address, dtype, shape, row stride
    *(c_void_p, c_double, c_int64, c_int64),  # scale, eps, dtype of rounding, bytes of a vector
    *(c_void_p, c_int64, c_void_p),  # y, its dtype, rstd
)


def _vector_bytes() -> int:
    """How wide the vectors are that torch sums with: added in the same order, sums have the same bits.

    torch has no sums for AVX-512, and uses those for AVX2 there.
    """
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return 16 if arm and torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 32


VECTOR_BYTES = _vector_bytes()


def widens_evenly(wide: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether the kernels can compute with these tensors in `wide`."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes <= {torch.float64} if wide == torch.float64 else torch.float64 not in dtypes


def scale_of(weight: Tensor | None, wide: torch.dtype, style: int = Style.CAST_THEN_SCALE) -> Tensor | None:
    """(D,) contiguous: what xhat is multiplied by."""
    if weight is None:
        return None
    one_plus = style == Style.ONE_PLUS
    scale = weight.to(wide, copy=one_plus).contiguous()
    return scale.add_(1.0) if one_plus else scale


def scale_bytes(weight: Tensor | None, wide: torch.dtype, style: int = Style.CAST_THEN_SCALE) -> int:
    """What `scale_of` allocates."""
    if weight is None or (weight.dtype == wide and weight.is_contiguous() and style != Style.ONE_PLUS):
        return 0
    return weight.shape[0] * wide.itemsize


def launch(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> tuple[Tensor, Tensor]:
    wide = statistic_dtype(x.dtype, double)
    if not widens_evenly(wide, x, weight):
        return reference.rms_norm(x, weight, eps, style, double)
    weight_dtype = None if weight is None else weight.dtype
    rounded = rounded_dtype(x.dtype, weight_dtype, style) or wide
    scale, rows = scale_of(weight, wide, style), rows_of(x)
    y = x.new_empty(x.shape, dtype=output_dtype(x.dtype, weight_dtype, style, double))
    rstd = x.new_empty(x.shape[:1], dtype=wide)
    _kernel(
        *(rows.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, rows.stride(0)),
        *(None if scale is None else scale.data_ptr(), eps, DTYPE_CODES[rounded], VECTOR_BYTES),
        *(y.data_ptr(), DTYPE_CODES[y.dtype], rstd.data_ptr()),
    )
    return y, rstd


def workspace_bytes(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> int:
    wide = statistic_dtype(x.dtype, double)
    if not widens_evenly(wide, x, weight):
        return reference.workspace_bytes(x, weight, eps, style, double)
    return scale_bytes(weight, wide, style) + rows_bytes(x)
