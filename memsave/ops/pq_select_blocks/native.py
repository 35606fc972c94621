"""Calls the C++ kernel of `pq_select_blocks`, csrc/pq_select_blocks.cpp.

B sequences, H heads, N query blocks, S keys in L blocks, K key blocks to keep.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import function
from ..pq_select.native import PIECES, copied_bytes, mask_arguments

_kernel = function(
    "ms_pq_select_blocks",
    *(c_void_p, c_void_p, c_void_p),  # table, weights, codes
    *(c_void_p, *[c_int64] * 4),  # mask and its strides
    *[c_int64] * 6,  # B, H, N, r, M, S
    *[c_int64] * 7,  # is_causal, window, position, block size, K, local, pieces
    *(c_void_p, c_void_p),  # scratch, out
)


def launch(
    table: Tensor,
    weights: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> Tensor:
    batch, heads, blocks, representatives, subspaces, _ = table.shape
    keys = codes.shape[3]
    table, weights, codes = table.contiguous(), weights.contiguous(), codes.contiguous()
    out = table.new_empty((batch, heads, blocks, keep), dtype=torch.int32)
    scratch = table.new_empty(_scratch_elements(table, codes, block_size), dtype=torch.int64)
    _kernel(
        *(table.data_ptr(), weights.data_ptr(), codes.data_ptr()),
        *mask_arguments(mask, (batch, heads, blocks, keys)),
        *(batch, heads, blocks, representatives, subspaces, keys),
        *(is_causal, window, position, block_size, keep, local, PIECES),
        *(scratch.data_ptr(), out.data_ptr()),
    )
    return out


def _scratch_elements(table: Tensor, codes: Tensor, block_size: int) -> int:
    batch, heads, blocks = table.shape[:3]
    return min(PIECES, batch * heads * blocks) * 2 * -(-codes.shape[3] // block_size)


def workspace_bytes(
    table: Tensor,
    weights: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> int:
    """The shares of one query block for each piece, twice."""
    return copied_bytes(table, weights, codes) + 8 * _scratch_elements(table, codes, block_size)
