"""Rows of `sampled_matmul`, whose sums round: float64 and the error of plain PyTorch bound the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, far_rows, matrix, row_indices, scales, short, strided


def oracle(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """(N, O), (k, D), (k,), (k,) -> (O, D) float64."""
    return torch.einsum("ko,kd,k->od", dy[rows.long()].double(), kept.double(), scale.double())


def plain(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """The same in the dtype of dy."""
    return (dy[rows.long()] * scale[:, None]).to(dy.dtype).t() @ kept


SPEC = OpSpec("sampled_matmul", oracle, plain, exact=False)


def arguments(n: int, k: int, d: int, o: int, dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Any, ...]]:
    """`make` for dy (N, O), kept (k, D), rows (k,), scale (k,)."""
    return lambda: (matrix(n, o, dtype), matrix(k, d, dtype, value=5), row_indices(n, k), scales(k))


_SHAPES = {  # N, k, D, O
    "odd": (37, 11, 19, 23),
    "even": (128, 64, 64, 96),
    "one_row_kept": (50, 1, 7, 1),
    "all_rows_kept": (20, 20, 33, 16),
    "no_rows_kept": (6, 0, 5, 4),
    "no_inputs": (6, 3, 0, 4),
    "no_outputs": (6, 3, 5, 0),
}


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    cases = [OpCase(SPEC, f"{name}_{short(dtype)}", arguments(*sizes, dtype)) for name, sizes in _SHAPES.items()]
    return [*cases, OpCase(SPEC, f"many_{short(dtype)}", arguments(1500, 450, 130, 70, dtype), large=True)]


def _transposed() -> tuple[Any, ...]:
    return matrix(24, 40).t(), matrix(17, 26)[:, 2:20], row_indices(40, 17), scales(17)


def _repeated() -> tuple[Any, ...]:
    rows = torch.tensor([7, 7, 0, 7], dtype=torch.int32)
    return matrix(8, 6), matrix(4, 5, value=5), rows, scales(4)


def _strided() -> tuple[Any, ...]:
    return strided(matrix(9, 7)), strided(matrix(5, 3)), strided(row_indices(9, 5)), strided(scales(5))


def _far() -> tuple[Any, ...]:
    dy, rows = far_rows(torch.float16)
    return dy, matrix(4, 3, torch.float16), rows, scales(4)


# Enough kept rows for two slices of the Triton kernel, with and without a remainder.
SLICED = [OpCase(SPEC, f"sliced_{k}", arguments(1200, k, 9, 5)) for k in (1024, 1025, 1111)]

CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "transposed", _transposed),
    OpCase(SPEC, "repeated_rows", _repeated),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "beyond_float32_integers", _far, large=True),
    *SLICED,
]
