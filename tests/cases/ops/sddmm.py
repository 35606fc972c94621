"""Rows of `sddmm`, whose sums round: float64 and the error of plain PyTorch bound the error.

N tokens, an R x C matrix of which K entries are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, row_indices, short, strided


def oracle(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """(N, R), (N, C), (K,) -> (K,) float64, summed in more than float64 where numpy has it."""
    rows, columns = numpy.divmod(indices.numpy(), max(b.shape[1], 1))
    return torch.from_numpy((longer(a)[:, rows] * longer(b)[:, columns]).sum(0).astype(float))


def longer(tensor: Tensor) -> Any:
    return tensor.double().numpy().astype(numpy.longdouble)


def plain(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """The same in the dtype of a, from the dense product."""
    return (a.t() @ b).view(-1)[indices.long()]


SPEC = OpSpec("sddmm", oracle, plain, exact=False)


def arguments(n: int, r: int, c: int, k: int, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Any, ...]]:
    """`make` for a (N, R), b (N, C) and k entries, drawn from all."""
    return lambda: (matrix(n, r, dtype), matrix(n, c, dtype, value=5), row_indices(r * c, k))


_SHAPES = {  # N, R, C, K
    "odd": (37, 19, 23, 45),
    "even": (64, 32, 48, 128),
    "few": (37, 61, 67, 25),
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


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    cases = [OpCase(SPEC, f"{name}_{short(dtype)}", arguments(*sizes, dtype)) for name, sizes in _SHAPES.items()]
    large = {"many": (700, 130, 270, 1700), "long": (2101, 41, 35, 8)}
    return cases + [
        OpCase(SPEC, f"{name}_{short(dtype)}", arguments(*large[name], dtype), large=True) for name in large
    ]


def _first_and_last() -> tuple[Any, ...]:
    return matrix(30, 70), matrix(30, 50, value=5), torch.tensor([0, 70 * 50 - 1], dtype=torch.int32)


def _full_rows() -> tuple[Any, ...]:
    """Every entry of a few rows, with empty rows between."""
    rows = torch.tensor([3, 40, 41, 99])
    indices = (rows[:, None] * 21 + torch.arange(21)).view(-1).to(torch.int32)
    return matrix(40, 100), matrix(40, 21, value=5), indices


def _transposed() -> tuple[Any, ...]:
    return matrix(24, 40).t(), matrix(19, 40, value=5).t(), row_indices(24 * 19, 60)


def _few_transposed() -> tuple[Any, ...]:
    return matrix(62, 48)[:, :39].t(), matrix(45, 39, value=5).t(), row_indices(62 * 45, 17)


def _few_strided() -> tuple[Any, ...]:
    return strided(matrix(35, 60)), strided(matrix(35, 58, value=5)), strided(row_indices(60 * 58, 24))


def _column_slices() -> tuple[Any, ...]:
    return matrix(33, 60)[:, 5:45], matrix(33, 50, value=5)[:, 3:38], row_indices(40 * 35, 99)


def _strided() -> tuple[Any, ...]:
    return strided(matrix(35, 20)), strided(matrix(35, 18, value=5)), strided(row_indices(20 * 18, 33))


def _expanded() -> tuple[Any, ...]:
    return matrix(1, 20).expand(19, 20), matrix(19, 1, value=5).expand(19, 18), row_indices(20 * 18, 33)


# Several tiles of tokens, rows in several blocks, and more columns than the C++ kernel takes at once. So few entries as
# in "few" and "long" the Triton kernel sums one by one, in "long" over two chunks of tokens.
LARGE = {
    "tiles": (1024, 70, 45, 400),
    "tiles_and_one": (513, 70, 45, 400),
    "wide": (40, 9, 9000, 700),
    "tall": (40, 3000, 11, 1700),
    "dense": (300, 100, 110, 11000),
}

CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "first_and_last", _first_and_last),
    OpCase(SPEC, "full_rows", _full_rows),
    OpCase(SPEC, "transposed", _transposed),
    OpCase(SPEC, "few_transposed", _few_transposed),
    OpCase(SPEC, "few_strided", _few_strided),
    OpCase(SPEC, "column_slices", _column_slices),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "expanded", _expanded),
    *(OpCase(SPEC, name, arguments(*sizes), large=True) for name, sizes in LARGE.items()),
]
