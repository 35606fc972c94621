"""Rows of `spmm`, whose sums round: float64 and the error of plain PyTorch bound the error.

N rows; S is (R, C) with K entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, generator, matrix, row_indices, short, strided
from .sddmm import longer


def oracle(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    """float64, summed in more than float64 where numpy has it."""
    row, column = numpy.divmod(indices.numpy(), max(columns, 1))
    inner, outer = (column, row) if transposed else (row, column)
    out = numpy.zeros((rows if transposed else columns, x.shape[0]), dtype=numpy.longdouble)
    numpy.add.at(out, outer, (longer(x)[:, inner] * longer(values)).T)
    return torch.from_numpy(out.T.astype(float))


def plain(x: Tensor, values: Tensor, indices: Tensor, rows: int, columns: int, transposed: bool) -> Tensor:
    """The same in the dtype of x, by a dense matrix."""
    dense = x.new_zeros(rows * columns)
    dense[indices.long()] = values.to(x.dtype)
    dense = dense.view(rows, columns)
    return x @ (dense.t() if transposed else dense)


SPEC = OpSpec("spmm", oracle, plain, exact=False)


def entries(k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(k, generator=generator(6)).to(dtype)


def arguments(
    n: int,
    r: int,
    c: int,
    k: int,
    transposed: bool,
    dtype: torch.dtype = torch.float32,
    of_values: torch.dtype | None = None,
) -> Callable[[], tuple[Any, ...]]:
    """`make` for x (N, C) or (N, R), and k entries, drawn from all."""
    return lambda: (
        matrix(n, c if transposed else r, dtype),
        entries(k, of_values or dtype),
        row_indices(r * c, k),
        *(r, c, transposed),
    )


_SHAPES = {  # N, R, C, K
    "odd": (37, 19, 23, 45),
    "even": (64, 32, 48, 128),
    "one_token": (1, 5, 7, 9),
    "one_row": (21, 1, 33, 17),
    "one_column": (21, 33, 1, 17),
    "all_entries": (20, 13, 11, 143),
    "one_entry": (18, 40, 40, 1),
    "no_tokens": (0, 5, 7, 9),
    "no_entries": (6, 5, 7, 0),
    "no_rows": (6, 0, 7, 0),
    "no_columns": (6, 5, 0, 0),
}
_LARGE = {
    "many": (300, 130, 270, 1700),
    # Every remainder of a tile: with so many columns it has 128 tokens.
    "tiles": (256, 70, 45, 400),
    "tiles_and_one": (257, 70, 45, 400),
    "tiles_and_some": (215, 61, 47, 400),
    "dense": (150, 100, 110, 11000),
}
_WAYS = {"s": False, "s_transposed": True}


def _named(
    name: str, sizes: tuple[int, int, int, int], *dtypes: torch.dtype, large: bool = False, suffix: str = ""
) -> list[OpCase]:
    return [
        OpCase(SPEC, f"{name}_{way}{suffix}", arguments(*sizes, transposed, *dtypes), large=large)
        for way, transposed in _WAYS.items()
    ]


def _of_dtype(dtype: torch.dtype) -> list[OpCase]:
    cases = [case for name in _SHAPES for case in _named(name, _SHAPES[name], dtype, suffix=f"_{short(dtype)}")]
    for name in _LARGE:
        cases += _named(name, _LARGE[name], dtype, large=True, suffix=f"_{short(dtype)}")
    return cases


def _mixed() -> list[OpCase]:
    """Values of another dtype than that of x."""
    pairs = [(x, values) for x in FLOATS for values in FLOATS if x != values]
    return [
        case
        for x, values in pairs
        for case in _named("mixed", (37, 19, 23, 45), x, values, suffix=f"_{short(x)}_{short(values)}")
    ]


def _first_and_last(transposed: bool) -> tuple[Any, ...]:
    indices = torch.tensor([0, 70 * 50 - 1], dtype=torch.int32)
    return matrix(30, 50 if transposed else 70), entries(2), indices, 70, 50, transposed


def _full_rows(transposed: bool) -> tuple[Any, ...]:
    """Every entry of a few rows, with empty rows between."""
    rows = torch.tensor([3, 40, 41, 99])
    indices = (rows[:, None] * 21 + torch.arange(21)).view(-1).to(torch.int32)
    return matrix(40, 21 if transposed else 100), entries(84), indices, 100, 21, transposed


def _full_columns(transposed: bool) -> tuple[Any, ...]:
    """Every entry of a few columns, more of each than are summed at once."""
    columns = torch.tensor([0, 6, 7, 20])
    indices = (torch.arange(100)[:, None] * 21 + columns).view(-1).to(torch.int32)
    return matrix(40, 21 if transposed else 100), entries(400), indices, 100, 21, transposed


def _turned(transposed: bool) -> tuple[Any, ...]:
    x = matrix(19 if transposed else 24, 40).t()
    return x, entries(60), row_indices(24 * 19, 60), 24, 19, transposed


def _column_slice(transposed: bool) -> tuple[Any, ...]:
    x = matrix(33, 60)[:, 5 : 40 if transposed else 45]
    return x, entries(99), row_indices(40 * 35, 99), 40, 35, transposed


def _strided(transposed: bool) -> tuple[Any, ...]:
    x = matrix(35, 18 if transposed else 20)
    return strided(x), strided(entries(33)), strided(row_indices(20 * 18, 33)), 20, 18, transposed


def _expanded(transposed: bool) -> tuple[Any, ...]:
    x = matrix(1, 18 if transposed else 20).expand(19, -1)
    return x, entries(1).expand(33), row_indices(20 * 18, 33), 20, 18, transposed


_STRANGE = (_first_and_last, _full_rows, _full_columns, _turned, _column_slice, _strided, _expanded)

CASES = [
    *(case for dtype in FLOATS for case in _of_dtype(dtype)),
    *_mixed(),
    *(
        OpCase(SPEC, f"{make.__name__[1:]}_{way}", lambda make=make, transposed=transposed: make(transposed))
        for make in _STRANGE
        for way, transposed in _WAYS.items()
    ),
    *_named("wide", (40, 9, 9000, 300), large=True),
    *_named("tall", (40, 3000, 11, 400), large=True),
    # More than one group of tiles, and of tiles that are narrower than the widest.
    *_named("groups", (1100, 1500, 2100, 3000), large=True),
]
