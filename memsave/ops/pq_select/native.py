"""Calls the C++ kernel of `pq_select`, csrc/pq_select.cpp.

B sequences, H heads, R rows, S keys, K keys to keep.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import function

PIECES = 16  # of the rows, each with scratch memory of its own

_kernel = function(
    "ms_pq_select",
    *(c_void_p, c_void_p, c_void_p, *[c_int64] * 4),  # table, codes, mask and its strides
    *[c_int64] * 5,  # B, H, R, M, S
    *[c_int64] * 5,  # is_causal, window, position, K, pieces
    *(c_void_p, c_void_p),  # scratch, out
)


def launch(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    batch, heads, rows, subspaces, _ = table.shape
    keys = codes.shape[3]
    table, codes = table.contiguous(), codes.contiguous()
    out = table.new_empty((batch, heads, rows, keep), dtype=torch.int32)
    scratch = table.new_empty(_scratch_bytes(table, codes), dtype=torch.uint8)
    _kernel(
        *(table.data_ptr(), codes.data_ptr(), *mask_arguments(mask, (batch, heads, rows, keys))),
        *(batch, heads, rows, subspaces, keys),
        *(is_causal, window, position, keep, PIECES),
        *(scratch.data_ptr(), out.data_ptr()),
    )
    return out


def mask_arguments(mask: Tensor | None, full: tuple[int, ...]) -> tuple[int | None, ...]:
    """The address of a mask, and its strides where it is as large as `full`, else 0."""
    if mask is None:
        return None, 0, 0, 0, 0
    expanded = mask.expand(full)
    return expanded.data_ptr(), *expanded.stride()


def copied_bytes(*tensors: Tensor) -> int:
    """What making these tensors contiguous allocates."""
    return sum(0 if t.is_contiguous() else t.numel() * t.element_size() for t in tensors)


def _scratch_bytes(table: Tensor, codes: Tensor) -> int:
    batch, heads, rows = table.shape[:3]
    return min(PIECES, batch * heads * rows) * codes.shape[3]


def workspace_bytes(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> int:
    """The sums of one row for each piece."""
    return copied_bytes(table, codes) + _scratch_bytes(table, codes)
