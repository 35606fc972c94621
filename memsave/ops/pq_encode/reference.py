"""Plain PyTorch implementation of `pq_encode`: scores of all codewords of a subspace, and the first of the largest.

B sequences, H heads, S keys, M subspaces of d features, C codewords.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    subspaces, features = codebook.shape[1], codebook.shape[3]
    out = x.new_zeros((*x.shape[:2], (subspaces + 1) // 2, x.shape[2]), dtype=torch.uint8)
    codebook = codebook.contiguous()
    halves = codebook.square().sum(-1).mul_(0.5)  # (H, M, C)
    with torch.autocast(x.device.type, enabled=False):
        for m in range(subspaces):
            part = x[..., m * features : (m + 1) * features]  # (B, H, S, d)
            out[:, :, m // 2].add_(_codes(part, codebook[:, m], halves[:, m]), alpha=16 if m % 2 else 1)
    return out


def _codes(part: Tensor, codewords: Tensor, halves: Tensor) -> Tensor:
    """(B, H, S, d), (H, C, d), (H, C) -> (B, H, S) uint8."""
    batch, heads, keys, features = part.shape
    rows = part.new_empty((heads, batch, keys, features), dtype=torch.float32).copy_(part.transpose(0, 1))
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x| is the same for all codewords.
    scores = torch.baddbmm(halves[:, None], rows.flatten(1, 2), codewords.mT, beta=-1)  # (H, B S, C)
    return scores.argmax(-1).to(torch.uint8).view(heads, batch, keys).transpose(0, 1)


def workspace_bytes(x: Tensor, codebook: Tensor) -> int:
    """Half the squared lengths of the codewords, and of one subspace keys in float32, scores, and codes as int64."""
    rows, (heads, subspaces, codewords, features) = x.shape[0] * x.shape[1] * x.shape[2], codebook.shape
    copied = 0 if codebook.is_contiguous() else 4 * codebook.numel()
    halves = 4 * heads * subspaces * codewords
    return copied + halves + max(4 * codebook.numel(), rows * (4 * features + 4 * codewords + 8 + 1))
