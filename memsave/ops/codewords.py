"""A codebook (H, M, C, d) as the C++ kernels of product quantization read it: (H, M, d, 16)."""

from __future__ import annotations

import torch
from torch import Tensor

CODEWORDS = 16


def by_feature(codebook: Tensor) -> Tensor:
    """(H, M, C, d) -> (H, M, d, 16), contiguous: codeword 0 takes the places of those that are missing."""
    heads, subspaces, count, features = codebook.shape
    out = codebook.new_empty((heads, subspaces, features, CODEWORDS))
    out[..., :count] = codebook.mT
    out[..., count:] = codebook[:, :, 0, :, None]
    return out


def by_feature_bytes(codebook: Tensor) -> int:
    """What `by_feature` allocates."""
    heads, subspaces, _, features = codebook.shape
    return torch.float32.itemsize * heads * subspaces * features * CODEWORDS
