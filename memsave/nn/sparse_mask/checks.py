"""What every function here demands of a mask; each check raises ValueError with a sentence.

M entries of a matrix, of which K are in the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_NUMEL = 2**31 - 1


def check_count(k: int, numel: int) -> None:
    """K of M entries must make sense, and M must fit int32."""
    if not 0 <= numel <= MAX_NUMEL:
        raise ValueError(f"a mask's matrix must have 0 to {MAX_NUMEL:,} entries (2^31 - 1), got {numel:,}")
    if not 0 <= k <= numel:
        raise ValueError(f"a mask must hold 0 to {numel:,} entries, as many as its matrix has, got {k:,}")


def check_indices(indices: Tensor, numel: int = MAX_NUMEL) -> None:
    """indices must be (K,) int32, strictly ascending, in [0, numel)."""
    if indices.dtype != torch.int32 or indices.dim() != 1:
        raise ValueError(
            f"the indices of a mask must be a 1-D int32 tensor, got shape {tuple(indices.shape)}, {indices.dtype}"
        )
    if not indices.numel():
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError("the indices of a mask must be strictly ascending, and these are not")
    first, last = int(indices[0]), int(indices[-1])
    if first < 0 or last >= numel:
        raise ValueError(f"the indices of a mask must lie in [0, {numel:,}), these go from {first:,} to {last:,}")


def check_delta(indices: Tensor, values: Tensor, numel: int = MAX_NUMEL) -> None:
    """A sparse delta: valid indices (K,) and as many floating-point values (K,)."""
    check_indices(indices, numel)
    if values.shape != indices.shape or not values.is_floating_point():
        raise ValueError(
            f"the values of a mask must be floating-point, one for each of the {indices.numel():,} indices, "
            f"got shape {tuple(values.shape)}, {values.dtype}"
        )
