"""Plain PyTorch implementation of `spmm`: torch's own sparse product.

N rows; S is (R, C) with K entries. torch has no sparse product of 16-bit numbers on the CPU, so these are widened. x is
turned over first: without that the product took 2 to 18 times as long there. A matrix in CSR is faster
still, but torch warns of it as unfinished.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..sddmm.reference import first_wrong, refuse


def spmm(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    wide, shape = wide_dtype(x), (rows, columns) if transposed else (columns, rows)
    if indices.device.type == "cpu":
        refuse(first_wrong(indices, rows * columns), indices, rows * columns)
    if not indices.shape[0]:
        return x.new_zeros(x.shape[0], shape[0])
    places = _places(indices, columns, transposed)
    # Rows first they are sorted; columns first they are not.
    sparse = torch.sparse_coo_tensor(
        places, values.to(wide), shape, check_invariants=False, is_coalesced=True if transposed else None
    )
    with torch.autocast(x.device.type, enabled=False):
        y = torch.sparse.mm(sparse, _turned(x, wide))  # (outputs, N)
    return _turned(y, x.dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """In which sums are added up."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _places(indices: Tensor, columns: int, transposed: bool) -> Tensor:
    """(2, K) int64: row and column, or column and row."""
    row, column = torch.div(indices, columns, rounding_mode="floor"), indices % columns
    return torch.stack((row, column) if transposed else (column, row)).long()


def _turned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, D) -> (D, N), contiguous."""
    return x.t().to(dtype, memory_format=torch.contiguous_format).contiguous()


def workspace_bytes(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> int:
    """Both operands as the product takes them, and the product, which torch allocates twice."""
    entries, wide, outputs = indices.shape[0], wide_dtype(x), rows if transposed else columns
    if not entries:
        return 0
    out, product = (x.shape[0] * outputs * dtype.itemsize for dtype in (x.dtype, wide))
    sparse = 16 * entries + (0 if values.dtype == wide else wide.itemsize * entries)
    turned, turning = _turning_bytes(x, wide)
    result, writing = _turning_bytes(x.new_empty((outputs, x.shape[0]), dtype=wide, device="meta"), x.dtype)
    peak = max(
        32 * entries,  # the positions
        sparse + turned + turning,
        sparse + turned + 2 * product,
        sparse + product + result + writing,
    )
    return peak - out


def _turning_bytes(x: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """What `_turned` returns, unless it is x itself, and what torch has while it copies: a square of 60 x 60."""
    if x.dtype == dtype and x.t().is_contiguous():
        return 0, 0
    in_squares = x.dtype == dtype and x.device.type in ("cpu", "meta") and x.is_contiguous() and x.numel() >= 60 * 60
    return x.numel() * dtype.itemsize, 60 * 60 * dtype.itemsize if in_squares else 0
