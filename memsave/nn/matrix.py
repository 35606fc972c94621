"""Tensors of any shape as the matrices that ops take, and back: x is (..., D), N rows."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """(..., D) -> (N, D); a single number is a row of one."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1] if x.dim() else 1)


def in_shape(y: Tensor, shape: torch.Size) -> Tensor:
    """(N, D) -> (..., D): as `view`, but not a view for autograd, which would let nobody modify it in place."""
    return torch.ops.aten._unsafe_view(y, shape)


def row_norms(x: Tensor) -> Tensor:
    """(N,) of x (N, D), in float32 at least."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
