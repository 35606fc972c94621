"""With which probability each row is kept: proportional to its weight, capped at 1, exactly k rows in all.

N rows, k kept rows. Source: probability proportional to size without replacement; Tille, "Sampling Algorithms", 2006.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "row_inclusion(Tensor weights, SymInt k) -> Tensor",
    fake=lambda weights, k: weights.new_empty(weights.shape, dtype=torch.int64),
    reference=reference,
    kernels=("native", "triton"),
)


def row_inclusion(weights: Tensor, k: int) -> Tensor:
    """Inclusion probabilities q / 2^32 for keeping k of N rows, in integers, so that every backend gives the same.

    q_i is in [1, 2^32] and the q_i sum exactly to k * 2^32. Rows whose share would exceed 1 get 2^32; the others are
    proportional to their weight, quantized to 2^-30 of the largest one, plus one step so that no row is impossible. The
    remainder of rounding, at most about N of these 2^32ths, goes to the first rows below 2^32.

    Args:
        weights: (N,) floating point. Negative values count as 0; NaN and infinity as the largest float32.
        k: number of rows to keep, 1 <= k < N.

    Returns:
        (N,) int64.

    Raises:
        ValueError: weights of another shape or dtype, no rows, 2^31 rows or more, k outside [1, N - 1].
    """
    _check.floating("weights", weights, 1)
    _check.kept_rows(k, weights.shape[0])
    return _op(weights, k)
