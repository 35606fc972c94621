"""What every mask must be, and dense matrices from sparse deltas."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_valid(indices: Tensor, k: int, numel: int) -> None:
    """k positions, strictly ascending, in [0, numel)."""
    assert indices.dtype == torch.int32 and indices.shape == (k,)
    values = indices.tolist()
    assert values == sorted(set(values))
    assert not values or 0 <= values[0] and values[-1] < numel


def dense(indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    matrix = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    matrix[indices.long()] = values.double()
    return matrix.view(shape)
