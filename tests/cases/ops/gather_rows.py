"""Rows of `gather_rows`, which rounds each product once: the bits follow from float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, far_rows, matrix, row_indices, scales, short, strided


def oracle(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """(N, D), (k,), (k,) -> (k, D): the product in float64, where none of up to 53 bits is lost, then rounded."""
    kept = x[rows.long()]
    if scale is None:
        return kept
    product = kept.double() * scale.double()[:, None]
    return product.to(torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


SPEC = OpSpec("gather_rows", oracle)


def _args(x: Callable[[], Tensor], k: int, scaled: bool) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        values = x()
        return values, row_indices(values.shape[0], k), scales(k) if scaled else None

    return make


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    inputs: dict[str, tuple[Callable[[], Tensor], int]] = {
        "odd": (partial(matrix, 37, 19, dtype), 11),
        "wide": (partial(matrix, 20, 128, dtype), 20),
        "transposed": (lambda: matrix(24, 40, dtype).t(), 13),
        "column_slice": (lambda: matrix(30, 48, dtype)[:, 5:26], 9),
        "no_rows_kept": (partial(matrix, 6, 5, dtype), 0),
        "no_features": (partial(matrix, 6, 0, dtype), 3),
    }
    not_finite = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0], [-float("inf"), 6e4]]).to(dtype)
    extremes = torch.tensor([[6.5e4, 3e38], [1e-8, 1e-45], [6e-8, -0.0]]).to(dtype)
    return [
        *(
            OpCase(SPEC, f"{name}_{short(dtype)}{'_scaled' if scaled else ''}", _args(x, k, scaled))
            for scaled in (False, True)
            for name, (x, k) in inputs.items()
        ),
        OpCase(SPEC, f"not_finite_{short(dtype)}", _args(not_finite.clone, 3, True)),
        OpCase(SPEC, f"extremes_{short(dtype)}", _args(extremes.clone, 3, True)),
        OpCase(SPEC, f"many_{short(dtype)}", _args(partial(matrix, 2000, 257, dtype), 600, True), large=True),
    ]


def _repeated() -> tuple[Any, ...]:
    return matrix(5, 8), torch.tensor([4, 4, 0, 4], dtype=torch.int32), scales(4)


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "repeated_rows", _repeated),
    OpCase(SPEC, "expanded", lambda: (matrix(1, 8).expand(6, 8), row_indices(6, 4), scales(4))),
    OpCase(SPEC, "strided", lambda: (strided(matrix(9, 7)), strided(row_indices(9, 5)), strided(scales(5)))),
    OpCase(SPEC, "beyond_float32_integers", lambda: (*far_rows(torch.float16), scales(4)), large=True),
]
