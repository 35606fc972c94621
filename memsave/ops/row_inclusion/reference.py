"""Plain PyTorch implementation of `row_inclusion`, without host syncs, in integers wherever rounding could differ.

N rows, k kept rows, c capped rows (inclusion probability 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

ONE = 2**32  # probability 1 in fixed point
WEIGHT_STEPS = 2**30
WEIGHT_MAX = torch.finfo(torch.float32).max

# The five roundings between exact arithmetic and m * ratio, each at most 2^-53, can then never push the sum of q above
# its budget.
ROUND_DOWN = 1.0 - 2.0**-50


def integer_weights(weights: Tensor) -> Tensor:
    """m = 1 + floor(w / max(w) * 2^30): (N,) int64 in [1, 2^30 + 1], with NaN and inf as the largest float32."""
    w = weights.double().nan_to_num(nan=WEIGHT_MAX, posinf=WEIGHT_MAX, neginf=0.0).clamp(0.0, WEIGHT_MAX)
    largest = w.max()
    return (w / torch.where(largest > 0, largest, 1.0) * WEIGHT_STEPS).long() + 1


def cap(sorted_m: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many rows get probability 1, and the sum of the others: c and S_c = m_c + ... + m_(N-1), 0-d int64 tensors.

    c is the smallest number with (k - c) * m_c < S_c. Where this fails for c it fails for c - 1: adding m_(c-1) to both
    sides turns the inequality of c - 1 into (k - c) * m_(c-1) < S_c, and m_(c-1) >= m_c. So c is the number of
    failures. It holds for c = k - 1, because N > k.

    Args:
        sorted_m: (N,) int64, descending.
    """
    suffix_sum = sorted_m.flip(0).cumsum(0).flip(0)  # (N,)
    remaining = torch.arange(k, 0, -1, device=sorted_m.device)  # (k,) of k - c
    c = (remaining * sorted_m[:k] >= suffix_sum[:k]).sum()
    return c, suffix_sum.take(c)


def row_inclusion(weights: Tensor, k: int) -> Tensor:
    m = integer_weights(weights)  # (N,)
    c, uncapped_sum = cap(m.sort(descending=True).values, k)
    # Exactly the c first rows in sorted order, ties included: the inequality of c - 1 failed, that of c holds.
    capped = (k - c) * m >= uncapped_sum

    budget = (k - c) * ONE
    n_uncapped = m.numel() - c
    ratio = (budget - n_uncapped).double() / uncapped_sum.double() * ROUND_DOWN
    q = torch.where(capped, ONE, (1 + (m.double() * ratio).long()).clamp(max=ONE))

    remainder = k * ONE - q.sum()
    room = ONE - q
    room_before = room.cumsum(0) - room
    return q + torch.minimum((remainder - room_before).clamp(min=0), room)


def workspace_bytes(weights: Tensor, k: int) -> int:
    return 41 * weights.numel() + 48  # counted with torch.profiler, like the other references
