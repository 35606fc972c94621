"""Plain PyTorch implementation of `draw_winners`, without host syncs.

N rows, k draws, c winners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import REPLACEMENT_STREAM, row_words
from ..row_inclusion.reference import cap, integer_weights

_LIMB = 2**31 - 1


def _random_below(limit: Tensor, n: int, seed: Tensor) -> Tensor:
    """(n,) int64 in [0, limit) for a 0-d limit <= 2^61: floor(r * limit / 2^62) for random 62-bit r, by 31-bit limbs.

    Every interval [a, b) of values is hit with its exact probability up to 2^-62.
    """
    word_0, word_1, _, _ = row_words(torch.arange(n, device=seed.device), REPLACEMENT_STREAM, seed)
    r_low, r_high = word_0 & _LIMB, word_1 & _LIMB
    low, high = limit & _LIMB, limit >> 31
    return r_high * high + ((r_high * low + r_low * high + (r_low * low >> 31)) >> 31)


def draw_winners(weights: Tensor, k: int, seed: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    m, order = integer_weights(weights).sort(descending=True, stable=True)  # (N,)
    ends = m.cumsum(0)
    # (1 - P_c) / (k - c) falls from c to c + 1 exactly where row c would be capped: the winners are the capped rows.
    c, rest_sum = cap(m, k) if winners else (m.new_zeros(()), ends[-1])
    rank = torch.arange(k, device=m.device)

    target = ends[-1] - rest_sum + _random_below(rest_sum, k, seed)
    drawn = torch.searchsorted(ends, target, right=True)  # (k,)
    position = torch.where(rank < c, rank, drawn)
    scale = torch.where(rank < c, 1.0, rest_sum.double() / ((k - c) * m[position]).double())
    return order[position].to(torch.int32), scale.float()


def workspace_bytes(weights: Tensor, k: int, seed: Tensor, winners: bool) -> int:
    n = weights.numel()
    while_drawing = 24 * n + 112 * k + (72 if winners else 64)
    return max(40 * n - 8 * k, while_drawing) if winners else while_drawing
