"""Some rows of the R x C product at a time, for the implementations of `sddmm` that take entries from it."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ROWS, BLOCK_BYTES = 256, 8 * 2**20


def product(a: Tensor, b: Tensor) -> Tensor:
    """(N, rows), (N, C) -> (rows, C), in their dtype also where autocast would choose another."""
    with torch.autocast(a.device.type, enabled=False):
        return a.t() @ b


def block_rows(a: Tensor, b: Tensor) -> int:
    """How many rows of the product are there at once."""
    fitting = BLOCK_BYTES // max(1, b.shape[1] * b.element_size())
    return max(1, min(BLOCK_ROWS, fitting, a.shape[1]))


def as_operand(x: Tensor) -> Tensor:
    """x (N, D) with strides that matrix products take as they are; a copy where they do not."""
    return x if _is_operand(x) else x.contiguous()


def operand_bytes(x: Tensor) -> int:
    """What `as_operand` allocates."""
    return 0 if _is_operand(x) else x.numel() * x.element_size()


def _is_operand(x: Tensor) -> bool:
    (n, d), (stride_n, stride_d) = x.shape, x.stride()
    by_rows, by_columns = stride_d == 1 and stride_n >= max(1, d), stride_n == 1 and stride_d >= max(1, n)
    return x.numel() == 0 or by_rows or by_columns
