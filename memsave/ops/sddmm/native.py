"""Calls the C++ kernel of `sddmm`, csrc/sddmm.cpp.

N tokens, an R x C matrix, K entries.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function
from .reference import refuse

TILE = 256  # tokens that an entry sums at once; the kernel takes up to 256, in multiples of 16
BLOCK = 4096  # columns of b that wait in scratch memory, and as many tiles of them as there is room for
SCRATCH_ELEMENTS = TILE * BLOCK

_kernel = function(
    "ms_sddmm",
    *(c_void_p, c_int64, c_int64, c_int64),  # a: address, R, strides
    *(c_void_p, c_int64, c_int64, c_int64),  # b: address, C, strides
    *(c_int64, c_int64, c_void_p, c_int64),  # dtype, N, indices, K
    *(c_int64, c_int64, c_int64, c_void_p, c_void_p, c_void_p),  # tile, pass, block, scratch, sums, out
)


def launch(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    (n, r), c, k, wide = a.shape, b.shape[1], indices.shape[0], _sum_dtype(a)
    indices, out = indices.contiguous(), a.new_empty(k)
    sums = out if a.dtype == wide else a.new_empty(k, dtype=wide)
    scratch = a.new_empty(_scratch_elements(a, b), dtype=wide)
    wrong = _kernel(
        *(a.data_ptr(), r, *a.stride(), b.data_ptr(), c, *b.stride()),
        *(DTYPE_CODES[a.dtype], n, indices.data_ptr(), k),
        *(TILE, _pass_tokens(b), BLOCK, scratch.data_ptr(), sums.data_ptr(), out.data_ptr()),
    )
    refuse(wrong, indices, r * c)
    return out


def _sum_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _pass_tokens(b: Tensor) -> int:
    """Tokens whose tiles wait at once: threads wait for each other twice for so many."""
    return SCRATCH_ELEMENTS // (TILE * min(BLOCK, max(1, b.shape[1]))) * TILE


def _scratch_elements(a: Tensor, b: Tensor) -> int:
    return min(_pass_tokens(b), -(-a.shape[0] // 16) * 16) * min(BLOCK, b.shape[1])


def workspace_bytes(a: Tensor, b: Tensor, indices: Tensor) -> int:
    """Tiles of b, and the sums where the result has another type."""
    copied = 0 if indices.is_contiguous() else 4 * indices.shape[0]
    sums = 0 if a.dtype == _sum_dtype(a) else 4 * indices.shape[0]
    return copied + sums + _scratch_elements(a, b) * _sum_dtype(a).itemsize
