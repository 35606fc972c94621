"""Plain PyTorch implementation of `draw_rows`, without host syncs, on integers only.

N rows, k kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import OFFSET_STREAM, PERMUTATION_STREAM, row_words

ONE = 2**32


def permutation_keys(n: int, seed: Tensor) -> Tensor:
    """(n,) int64: a random non-negative 63-bit key for each row; sorting the rows by key permutes them."""
    word_0, word_1, _, _ = row_words(torch.arange(n, device=seed.device), PERMUTATION_STREAM, seed)
    return (word_1 & 0x7FFFFFFF) << 32 | word_0


def draw_rows(q: Tensor, k: int, seed: Tensor) -> Tensor:
    permutation = permutation_keys(q.numel(), seed).sort(stable=True).indices  # (N,)
    ends = q[permutation].cumsum(0)
    offset = row_words(seed.new_zeros(()), OFFSET_STREAM, seed)[0]
    thresholds = offset + torch.arange(k, device=q.device) * ONE
    positions = torch.searchsorted(ends, thresholds, right=True)  # (k,)
    return permutation[positions].sort().values.to(torch.int32)


def workspace_bytes(q: Tensor, k: int, seed: Tensor) -> int:
    return 112 * q.numel() - 4 * k + 48
