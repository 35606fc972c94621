"""Plain PyTorch implementation of `pq_encode`: scores of all codewords of a subspace, and the first of the largest.

B sequences, H heads, S keys, M subspaces of d features, C codewords.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    subspaces, features = codebook.shape[1], codebook.shape[3]
    out = x.new_zeros((*x.shape[:2], (subspaces + 1) // 2, x.shape[2]), dtype=torch.uint8)
    with torch.autocast(x.device.type, enabled=False):
        for m in range(subspaces):
            part = x[..., m * features : (m + 1) * features].float()  # (B, H, S, d)
            out[:, :, m // 2] += _codes(part, codebook[:, m]) << 4 * (m % 2)
    return out


def _codes(part: Tensor, codewords: Tensor) -> Tensor:
    """(B, H, S, d), (H, C, d) -> (B, H, S) uint8."""
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x| is the same for all codewords.
    scores = part @ codewords.mT - codewords.square().sum(-1)[:, None] / 2  # (B, H, S, C)
    return scores.argmax(-1).to(torch.uint8)


def workspace_bytes(x: Tensor, codebook: Tensor) -> int:
    """A subspace in float32, its scores twice, and codes as int64 and uint8."""
    rows = x.shape[0] * x.shape[1] * x.shape[2]
    if not rows:
        return 0
    part = 4 * rows * codebook.shape[3] if x.dtype != torch.float32 else 0
    norms = 4 * codebook.shape[0] * codebook.shape[2] * (codebook.shape[3] + 1)
    return part + norms + max(8 * rows * codebook.shape[2], rows * (4 * codebook.shape[2] + 8 + 2))
