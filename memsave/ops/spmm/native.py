"""Calls the C++ kernel of `spmm`, csrc/spmm.cpp.

N tokens; x (N, D), result (N, O); S is (R, C) with K entries.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

from torch import Tensor

from .._native import DTYPE_CODES, function
from ..sddmm.reference import refuse
from .reference import wide_dtype

SIDE, MAX_TILE = 16, 128  # a tile has a multiple of 16 tokens; the kernel takes up to 128
TILE_ELEMENTS = 2**17  # of x that are turned over in a tile: what stays in the nearest large cache
SCRATCH_ELEMENTS = 2**20  # tiles that wait at once, for which threads wait for each other twice; at least one

_kernel = function(
    "ms_spmm",
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # x: address, strides, dtype, N
    *(c_void_p, c_void_p, c_int64, c_int64, c_int64),  # indices, values, K, R, C
    *(c_int64, c_void_p, c_void_p, c_void_p),  # transposed; room: see the kernel
    *(c_int64, c_int64, c_void_p, c_void_p),  # tile, pass, scratch, out
)


def launch(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    n, k, wide = x.shape[0], indices.shape[0], wide_dtype(x)
    indices, values = indices.contiguous(), values.to(wide).contiguous()
    out = x.new_empty(n, rows if transposed else columns)
    starts = indices.new_empty(out.shape[1] + 1)
    inner, weights = indices.new_empty(k), values.new_empty(0 if transposed else k)
    scratch = values.new_empty(_scratch_elements(x))
    wrong = _kernel(
        *(x.data_ptr(), *x.stride(), DTYPE_CODES[x.dtype], n),
        *(indices.data_ptr(), values.data_ptr(), k, rows, columns),
        *(transposed, starts.data_ptr(), inner.data_ptr(), weights.data_ptr()),
        *(_tile_tokens(x), _pass_tokens(x), scratch.data_ptr(), out.data_ptr()),
    )
    refuse(wrong, indices, rows * columns)
    return out


def _tile_tokens(x: Tensor) -> int:
    fitting = TILE_ELEMENTS // max(1, x.shape[1]) // SIDE * SIDE
    return max(SIDE, min(MAX_TILE, fitting))


def _pass_tokens(x: Tensor) -> int:
    """Tokens whose tiles wait at once."""
    tile = _tile_tokens(x)
    return max(1, SCRATCH_ELEMENTS // (tile * max(1, x.shape[1]))) * tile


def _scratch_elements(x: Tensor) -> int:
    return min(_pass_tokens(x), -(-x.shape[0] // SIDE) * SIDE) * x.shape[1]


def workspace_bytes(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> int:
    """Tiles of x, where each output's entries are, for x S their values in that order, and copies of what has another
    layout or type."""
    entries, wide = indices.shape[0], wide_dtype(x)
    copied = 0 if indices.is_contiguous() else 4 * entries
    widened = 0 if values.is_contiguous() and values.dtype == wide else wide.itemsize * entries
    starts = 4 * ((rows if transposed else columns) + 1)
    ordered = (4 if transposed else 4 + wide.itemsize) * entries
    return copied + widened + starts + ordered + _scratch_elements(x) * wide.itemsize
