"""Calls the C++ kernel of `pq_encode`, csrc/pq_encode.cpp.

B sequences, H heads, S keys, M subspaces of d features.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function
from ..codewords import by_feature, by_feature_bytes

_kernel = function(
    "ms_pq_encode",
    *(c_void_p, *[c_int64] * 5),  # x: address, strides, dtype
    *[c_int64] * 5,  # B, H, S, M, d
    *(c_void_p, c_void_p, c_void_p),  # codewords, half their squared lengths, codes
)


def launch(x: Tensor, codebook: Tensor) -> Tensor:
    subspaces, features = codebook.shape[1], codebook.shape[3]
    out = x.new_empty((*x.shape[:2], (subspaces + 1) // 2, x.shape[2]), dtype=torch.uint8)
    codewords = by_feature(codebook)  # (H, M, d, 16)
    halves = codewords.square().sum(2) / 2  # (H, M, 16)
    _kernel(
        *(x.data_ptr(), *x.stride(), DTYPE_CODES[x.dtype]),
        *(*x.shape[:3], subspaces, features),
        *(codewords.data_ptr(), halves.data_ptr(), out.data_ptr()),
    )
    return out


def workspace_bytes(x: Tensor, codebook: Tensor) -> int:
    """The codewords turned over, their squares, and half of the sums of these, twice."""
    turned = by_feature_bytes(codebook)
    sums = turned // max(1, codebook.shape[3])
    return turned + max(turned + sums, 2 * sums)
