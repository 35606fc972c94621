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
    batch, heads, rows, _ = query.shape
    subspaces = codebook.shape[1]
    table = query.new_empty((batch, heads, rows, subspaces, MAX_CODEWORDS), dtype=torch.uint8)
    step = query.new_empty((batch, heads, rows), dtype=torch.float32)
    products = _products(query, codebook)  # (H, M, B R, 16)
    low = products.amin(-1, keepdim=True)
    total = (products.amax(-1, keepdim=True) - low).sum(1)  # (H, B R, 1)
    # A tensor: torch multiplies with the reciprocal instead, of a number on a GPU, and of a tensor below a number.
    largest = total.new_full((), LARGEST)
    factor = largest / total.clamp(min=TINY)
    scaled = products.sub_(low).mul_(factor[:, None]).clamp_(max=LARGEST)
    table.copy_(scaled.view(heads, subspaces, batch, rows, MAX_CODEWORDS).permute(2, 0, 3, 1, 4))
    step.copy_(total.div_(largest).view(heads, batch, rows).transpose(0, 1))
    return table, step


def _products(query: Tensor, codebook: Tensor) -> Tensor:
    """(B, H, R, D), (H, M, C, d) -> (H, M, B R, 16)."""
    batch, heads, rows, _ = query.shape
    subspaces, features = codebook.shape[1], codebook.shape[3]
    parts = query.new_empty((heads, subspaces, batch, rows, features), dtype=torch.float32)
    parts.copy_(query.unflatten(-1, (subspaces, features)).permute(1, 3, 0, 2, 4))
    with torch.autocast(query.device.type, enabled=False):
        products = torch.bmm(parts.flatten(2, 3).flatten(0, 1), padded(codebook).flatten(0, 1).mT)
    return products.view(heads, subspaces, batch * rows, MAX_CODEWORDS)


def padded(codebook: Tensor) -> Tensor:
    """(H, M, C, d) -> (H, M, 16, d), contiguous: codeword 0 takes the places of those that are missing."""
    missing = MAX_CODEWORDS - codebook.shape[2]
    first = codebook[:, :, :1].expand(-1, -1, missing, -1)
    return torch.cat((codebook, first), dim=2)


def workspace_bytes(query: Tensor, codebook: Tensor) -> int:
    """The products, and queries and codewords that they are made of, or what makes them a table."""
    heads, subspaces, _, features = codebook.shape
    rows = query.shape[0] * query.shape[1] * query.shape[2]
    inputs = 4 * query.numel() + 4 * heads * subspaces * MAX_CODEWORDS * features
    return 4 * rows * subspaces * MAX_CODEWORDS + max(
        inputs, 4 * rows * 3 * subspaces, 4 * rows * (2 * subspaces + 1) + 4
    )
