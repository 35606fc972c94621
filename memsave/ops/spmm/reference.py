"""Plain PyTorch implementation of `spmm`: torch's own sparse product.

N rows; S is (R, C) with K entries. torch has no sparse product of 16-bit numbers on the CPU, so these are widened.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spmm(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    row, column = torch.div(indices, columns, rounding_mode="floor"), indices % columns
    places, shape = ((row, column), (rows, columns)) if transposed else ((column, row), (columns, rows))
    sparse = torch.sparse_coo_tensor(torch.stack(places), values.to(wide), shape, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):
        y = torch.sparse.mm(sparse, x.to(wide).t())  # (out, N)
    return y.t().to(x.dtype, memory_format=torch.contiguous_format)


def workspace_bytes(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> int:
    raise NotImplementedError
