"""Calls the C++ kernel of `pq_table`, csrc/pq_table.cpp.

B sequences, H heads, R rows, M subspaces of d features.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function
from ..codewords import CODEWORDS, by_feature, by_feature_bytes

_kernel = function(
    "ms_pq_table",
    *(c_void_p, *[c_int64] * 5),  # query: address, strides, dtype
    *[c_int64] * 5,  # B, H, R, M, d
    *(c_void_p, c_void_p, c_void_p),  # codewords, table, step
)


def launch(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    subspaces, features = codebook.shape[1], codebook.shape[3]
    table = query.new_empty((*query.shape[:3], subspaces, CODEWORDS), dtype=torch.uint8)
    step = query.new_empty(query.shape[:3], dtype=torch.float32)
    codewords = by_feature(codebook)
    _kernel(
        *(query.data_ptr(), *query.stride(), DTYPE_CODES[query.dtype]),
        *(*query.shape[:3], subspaces, features),
        *(codewords.data_ptr(), table.data_ptr(), step.data_ptr()),
    )
    return table, step


def workspace_bytes(query: Tensor, codebook: Tensor) -> int:
    """The codewords turned over."""
    return by_feature_bytes(codebook)
