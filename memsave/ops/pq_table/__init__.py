"""Product quantization: the inner products of each query with all codewords, in integers that add up in a byte.

B sequences, H heads, R rows of D = M * d features, M subspaces, C codewords. The estimate of a product q k is the sum
over subspaces of the entry of k's code ("asymmetric distance computation", Jégou et al. 2011; in bytes: André et al.
2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..pq_encode import MAX_CODEWORDS, check_codebook
from . import reference

_op = register(
    "pq_table(Tensor query, Tensor codebook) -> (Tensor, Tensor)",
    fake=lambda query, codebook: (
        query.new_empty((*query.shape[:3], codebook.shape[1], MAX_CODEWORDS), dtype=torch.uint8),
        query.new_empty(query.shape[:3], dtype=torch.float32),
    ),
    reference=reference,
    kernels=("native",),
)


def pq_table(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """table[m, c] = floor((q_m codebook[m, c] - min_m) / step), computed in float32.

    min_m is the least product of subspace m and step the sum over subspaces of largest minus least, over 255: so
    entries of M subspaces add up to 255 at most, and their sum times step is an estimate of q k, up to what the keys
    of a row share.

    Args:
        query: (B, H, R, D) floating point, any strides.
        codebook: (H, M, C, d) float32, as `pq_encode` takes it.

    Returns:
        table (B, H, R, M, 16) uint8, where entries from C on are those of codeword 0, and step (B, H, R) float32.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on two devices.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("query", query, 4)
    check_codebook("query", query, codebook)
    table, step = _op(query, codebook)
    return table, step
