"""How much two sparse deltas of one matrix get in each other's way.

Deltas A1, A2 (N, m), each as (indices (K,), values (K,)). Their product G = A1^T A2 (m, m) says how orthogonal they
are. AWOM is its spectral norm, AWOR the share of its entries that are zero: 0 and 1 for deltas that cannot interfere.
All is computed on the CPU in float64, and of G never more than a bounded number of rows is held, unless m is small.

Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024 (arXiv 2406.13175), section 3.3: adapter weight orthogonality
magnitude and ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_count, check_delta

Delta = tuple[Tensor, Tensor]

_ENTRIES_AT_ONCE = 2**22
_EXACT_COLUMNS = 256  # up to here G is held whole and its norm is computed by an SVD
_TOLERANCE = 1e-9
_BASIS = 64
_RESTARTS = 100


class _Sparse:
    """A delta as entries (row, column, value), row by row; values that are zero are left out."""

    def __init__(self, delta: Delta, shape: tuple[int, int]) -> None:
        indices, values = delta
        check_delta(indices, values, shape[0] * shape[1])
        keep = values.detach().cpu() != 0
        flat = indices.detach().cpu()[keep].to(torch.int64)
        self.shape = shape
        self.rows, self.columns = flat // shape[1], flat % shape[1]
        self.values = values.detach().cpu()[keep].to(torch.float64)

    def times(self, x: Tensor) -> Tensor:
        """A x: (m,) -> (N,)."""
        return x.new_zeros(self.shape[0]).index_add_(0, self.rows, self.values * x[self.columns])

    def transposed_times(self, y: Tensor) -> Tensor:
        """A^T y: (N,) -> (m,)."""
        return y.new_zeros(self.shape[1]).index_add_(0, self.columns, self.values * y[self.rows])


def awom(first: Delta, second: Delta, shape: tuple[int, int]) -> float:
    """||A1^T A2||_2, the adapter weight orthogonality magnitude: its largest singular value.

    Exact up to rounding for m <= 256. Above, by restarted Lanczos iteration on G^T G from a fixed start, until the
    residual bounds the relative error of the norm by 1e-9 (if it is the largest singular value that was found, which a
    start without a component along its vector alone could prevent).

    Args:
        first: indices (K1,) int32, strictly ascending, and values (K1,), floating-point.
        second: the same with K2.
        shape: (N, m).

    Raises:
        ValueError: a delta is not valid, or does not fit the shape.
        ArithmeticError: the iteration did not converge.
    """
    a, b = _both(first, second, shape)
    with torch.device("cpu"):  # whatever the caller's default device is
        if shape[1] <= _EXACT_COLUMNS:
            blocks = list(_product_rows(a, b))
            return float(torch.linalg.matrix_norm(torch.cat(blocks), 2)) if blocks else 0.0
        return _largest_singular_value(a, b)


def awor(first: Delta, second: Delta, shape: tuple[int, int]) -> float:
    """1 - ||A1^T A2||_0 / m^2, the adapter weight orthogonality ratio: the share of zeros in A1^T A2.

    An entry counts as zero if its sum, in float64, is exactly zero. Arguments and errors as for `awom`.
    """
    a, b = _both(first, second, shape)
    with torch.device("cpu"):
        nonzeros = sum(int(block.count_nonzero()) for block in _product_rows(a, b))
    return 1.0 - nonzeros / shape[1] ** 2 if shape[1] else 1.0


def _both(first: Delta, second: Delta, shape: tuple[int, int]) -> tuple[_Sparse, _Sparse]:
    check_count(0, shape[0] * shape[1])
    return _Sparse(first, shape), _Sparse(second, shape)


def _product_rows(a: _Sparse, b: _Sparse) -> Iterator[Tensor]:
    """G = A^T B, dense (rows, m) float64, some rows at a time; rows of G are columns of A."""
    m = a.shape[1]
    order = a.columns.sort(stable=True).indices
    columns, rows, values = a.columns[order], a.rows[order], a.values[order]
    row_starts = torch.searchsorted(b.rows, torch.arange(b.shape[0] + 1))  # of B's entries
    partners = row_starts[rows + 1] - row_starts[rows]  # how many entries of B each entry of A meets
    height = max(1, _ENTRIES_AT_ONCE // max(m, 1))
    for top in range(0, m, height):
        block = torch.zeros(min(height, m - top) * m, dtype=torch.float64)
        begin, end = torch.searchsorted(columns, torch.tensor([top, top + height])).tolist()
        step = max(1, _ENTRIES_AT_ONCE // max(int(partners[begin:end].max()), 1)) if end > begin else 1
        for i in range(begin, end, step):
            part = slice(i, min(i + step, end))
            count = partners[part]
            ends = count.cumsum(0)
            entry = torch.arange(int(ends[-1])) + (row_starts[rows[part]] - ends + count).repeat_interleave(count)
            place = ((columns[part] - top) * m).repeat_interleave(count) + b.columns[entry]
            block.index_add_(0, place, values[part].repeat_interleave(count) * b.values[entry])
        yield block.view(-1, m)


def _largest_singular_value(a: _Sparse, b: _Sparse) -> float:
    """Of A^T B. Lanczos with full orthogonalization; each restart begins at the best vector so far."""
    m = a.shape[1]
    start = torch.arange(1, m + 1, dtype=torch.float64).sin() + 1e-3  # no zeros, no pattern that a mask could share
    for _ in range(_RESTARTS):
        value, start, residual = _lanczos(a, b, start / start.norm())
        if residual <= _TOLERANCE * value:
            return value**0.5
    raise ArithmeticError(f"awom: no convergence in {_RESTARTS * _BASIS} steps; relative residual {residual / value}")


def _lanczos(a: _Sparse, b: _Sparse, start: Tensor) -> tuple[float, Tensor, float]:
    """The largest eigenvalue of G^T G in the Krylov space of `start` (m,), its vector, and its residual."""
    basis = start.new_zeros(_BASIS, start.numel())
    projected = start.new_zeros(_BASIS, _BASIS)
    vector = start
    for j in range(_BASIS):
        basis[j] = vector
        image = b.transposed_times(a.times(a.transposed_times(b.times(vector))))  # G^T G v = B^T A A^T B v
        so_far = basis[: j + 1]
        overlap = so_far @ image
        projected[j, : j + 1] = overlap
        image -= overlap @ so_far
        image -= (so_far @ image) @ so_far  # once more: rounding
        values, vectors = torch.linalg.eigh(projected[: j + 1, : j + 1])  # reads the lower triangle
        value, residual = max(float(values[-1]), 0.0), float(image.norm() * vectors[-1, -1].abs())
        if residual <= _TOLERANCE * value or float(image.norm()) == 0.0:
            break
        vector = image / image.norm()
    return value, vectors[:, -1] @ so_far, residual
