"""Rows of `rms_norm`: every style, and each mixture of dtypes that changes where it rounds.

N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memsave.ops.rms_norm import Style
from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, short, strided

EPS = 1e-5


def oracle(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> tuple[Tensor, Tensor]:
    """(N, D), (D,) -> (N, D), (N,), in longdouble until the end: float64 itself is checked, too."""
    wide = x.double().numpy().astype(np.longdouble)
    rstd = 1 / np.sqrt((wide**2).mean(-1) + eps)
    scale = 1 if weight is None else weight.double().numpy().astype(np.longdouble) + (style == Style.ONE_PLUS)
    return torch.from_numpy((wide * rstd[:, None] * scale).astype(np.float64)), torch.from_numpy(
        rstd.astype(np.float64)
    )


def plain(x: Tensor, weight: Tensor | None, eps: float, style: int, double: bool) -> tuple[Tensor, Tensor]:
    """As models write it."""
    wide = x if double and x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    xhat = wide * rstd
    if weight is None:
        y = xhat.to(x.dtype)
    elif style == Style.CAST_THEN_SCALE:
        y = weight * xhat.to(x.dtype)
    elif style == Style.CAST_TO_WEIGHT:
        y = weight * (xhat.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else xhat)
    elif style == Style.SCALE_THEN_CAST:
        y = (weight * xhat).to(x.dtype)
    else:
        y = ((1.0 + weight.to(wide.dtype)) * xhat).to(x.dtype)
    return y, rstd[:, 0]


SPEC = OpSpec("rms_norm", oracle, plain, exact=False)


def arguments(
    n: int, d: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, style: Style, double: bool = False
) -> Callable[[], tuple[Any, ...]]:
    """`make` for x (N, D) and weight (D,)."""

    def make() -> tuple[Any, ...]:
        weight = None if weight_dtype is None else matrix(1, d, weight_dtype, value=7)[0]
        return matrix(n, d, dtype), weight, EPS, int(style), double

    return make


def _cases_of_dtypes(dtype: torch.dtype, weight_dtype: torch.dtype | None) -> list[OpCase]:
    double = dtype == weight_dtype == torch.float64
    dtypes = f"{short(dtype)}_{'no_weight' if weight_dtype is None else short(weight_dtype)}"
    return [
        OpCase(SPEC, f"{style.name.lower()}_{dtypes}", arguments(7, 91, dtype, weight_dtype, style, double))
        for style in Style
    ]


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    double = dtype == torch.float64
    shapes = {"odd": (37, 19), "even": (32, 128), "one_feature": (5, 1), "no_rows": (0, 5)}
    cases = [
        OpCase(SPEC, f"{name}_{short(dtype)}", arguments(n, d, dtype, dtype, Style.CAST_THEN_SCALE, double))
        for name, (n, d) in shapes.items()
    ]
    # More than one block of the C++ kernel, with groups, vectors and elements left over.
    wide = arguments(70, 2 * 1024 + 64 + 16 + 3, dtype, dtype, Style.SCALE_THEN_CAST, double)
    return [*cases, OpCase(SPEC, f"wide_{short(dtype)}", wide, large=True)]


def _strided() -> tuple[Any, ...]:
    return strided(matrix(9, 33)), strided(matrix(1, 33, value=7))[0], EPS, int(Style.ONE_PLUS), False


CASES = [
    *(case for dtype in FLOATS for weight in (None, *FLOATS) for case in _cases_of_dtypes(dtype, weight)),
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "column_slice", lambda: (matrix(6, 40)[:, 3:30], None, EPS, 0, False)),
    OpCase(SPEC, "transposed_bfloat16", lambda: (matrix(24, 40, torch.bfloat16).t(), None, EPS, 0, False)),
    OpCase(SPEC, "expanded", lambda: (matrix(1, 21).expand(6, 21), None, EPS, 0, False)),
    OpCase(SPEC, "eps_counts", lambda: (1e-3 * matrix(5, 33), None, 1.0, int(Style.CAST_THEN_SCALE), False)),
    OpCase(SPEC, "zeros", lambda: (torch.zeros(3, 17), torch.ones(17), 0.25, int(Style.ONE_PLUS), False)),
    OpCase(SPEC, "large_values", lambda: (1e15 * matrix(5, 33), None, EPS, 0, False)),
]
