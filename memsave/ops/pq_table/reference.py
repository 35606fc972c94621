"""Plain PyTorch implementation of `pq_table`.

B sequences, H heads, R rows, M subspaces of d features, C codewords.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODEWORDS = 16
LARGEST = 255.0
TINY = 1e-30
"""Below this, all products of a row count as equal."""


def pq_table(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    heads, subspaces, _, features = codebook.shape
    rows = query.float().unflatten(-1, (subspaces, features))  # (B, H, R, M, d)
    with torch.autocast(query.device.type, enabled=False):
        products = (rows[..., None, :] @ padded(codebook)[:, None].mT).squeeze(-2)  # (B, H, R, M, 16)
    low = products.amin(-1, keepdim=True)
    total = (products.amax(-1) - low.squeeze(-1)).sum(-1)  # (B, H, R)
    # A tensor: torch multiplies by the reciprocal of a tensor, and on a GPU by that of a number.
    largest = total.new_full((), LARGEST)
    factor = largest / total.clamp(min=TINY)
    table = ((products - low) * factor[..., None, None]).clamp_(max=LARGEST).to(torch.uint8)
    return table, total / largest


def padded(codebook: Tensor) -> Tensor:
    """(H, M, C, d) -> (H, M, 16, d), contiguous: codeword 0 takes the places of those that are missing."""
    missing = MAX_CODEWORDS - codebook.shape[2]
    first = codebook[:, :, :1].expand(-1, -1, missing, -1)
    return torch.cat((codebook, first), dim=2)


def padded_bytes(codebook: Tensor) -> int:
    """What `padded` allocates."""
    heads, subspaces, _, features = codebook.shape
    return 4 * heads * subspaces * MAX_CODEWORDS * features


def workspace_bytes(query: Tensor, codebook: Tensor) -> int:
    """The rows in float32, the products, and the same shifted and scaled."""
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    subspaces = codebook.shape[1]
    wide = 0 if query.dtype == torch.float32 else 4 * query.numel()
    return wide + padded_bytes(codebook) + rows * (subspaces * (2 * 4 * MAX_CODEWORDS + 4 * 3) + 4 * 3)
