"""Draws k rows with replacement, for comparison with `draw_rows`: the estimators CRS and WTA-CRS.

N rows, k draws, p_i = w_i / (w_0 + ... + w_(N-1)). Sources: Drineas, Kannan, Mahoney, "Fast Monte Carlo Algorithms for
Matrices I", 2006 (CRS); Liu et al., "Winner-Take-All Column Row Sampling", NeurIPS 2023 (WTA-CRS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference


def _fake(weights: Tensor, k: int, seed: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    return weights.new_empty((k,), dtype=torch.int32), weights.new_empty((k,), dtype=torch.float32)


_op = register(
    "draw_winners(Tensor weights, SymInt k, Tensor seed, bool winners) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference,
)


def draw_winners(weights: Tensor, k: int, seed: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    """k rows, with repetitions, and the weight of each in an unbiased estimate of a sum over all rows.

    CRS (`winners=False`): k independent draws with probability p_i, weight 1 / (k p_i). WTA-CRS (`winners=True`): the c
    rows of the largest weight for certain, with weight 1, then k - c independent draws from the others with weight
    (1 - P_c) / ((k - c) p_i), where P_c is the sum of the c largest p_i and c minimizes (1 - P_c) / (k - c).

    The p_i come from weights quantized as in `row_inclusion`. A draw has its probability up to 2^-62.

    Args:
        weights: (N,) floating point. Negative values count as 0; NaN and infinity as the largest float32.
        k: number of draws, 1 <= k < N.
        seed: 0-d int64, from `new_seed`.
        winners: WTA-CRS instead of CRS.

    Returns:
        rows (k,) int32, the winners first; scale (k,) float32.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, k outside [1, N - 1].
    """
    _check.floating("weights", weights, 1)
    _check.typed("seed", seed, torch.int64, 0)
    _check.kept_rows(k, weights.shape[0])
    _check.same_device(weights=weights, seed=seed)
    return _op(weights, k, seed, winners)
