"""Rows of `layer_norm`: with and without parameters, each mixture of dtypes, and rows far from zero.

N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, short, strided

EPS = 1e-5


def oracle(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> tuple[Tensor, Tensor]:
    """(N, D), (D,), (D,) -> (N, D), (N,), in longdouble until the end: float64 itself is checked, too."""
    wide, scale, shift = (
        default if t is None else t.double().numpy().astype(np.longdouble)
        for t, default in ((x, 0), (weight, 1), (bias, 0))
    )
    centered = wide - wide.mean(-1, keepdims=True)
    rstd = 1 / np.sqrt((centered**2).mean(-1) + eps)
    y = centered * rstd[:, None] * scale + shift
    return torch.from_numpy(y.astype(np.float64)), torch.from_numpy(rstd.astype(np.float64))


def plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> tuple[Tensor, Tensor]:
    """torch's operators in float32, or in float64 for float64."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale, shift = (None if t is None else t.to(wide.dtype).contiguous() for t in (weight, bias))
    y, _, rstd = torch.native_layer_norm(wide.contiguous(), wide.shape[1:], scale, shift, eps)
    return (y if widen else y.to(x.dtype)), rstd[:, 0]


SPEC = OpSpec("layer_norm", oracle, plain, exact=False)


def arguments(
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = torch.float32,
    bias_dtype: torch.dtype | None = torch.float32,
    widen: bool = False,
) -> Callable[[], tuple[Any, ...]]:
    """`make` for x (N, D), weight and bias (D,)."""

    def make() -> tuple[Any, ...]:
        weight = None if weight_dtype is None else matrix(1, d, weight_dtype, value=7)[0]
        bias = None if bias_dtype is None else matrix(1, d, bias_dtype, value=9)[0]
        return matrix(n, d, dtype) + 0.5, weight, bias, EPS, widen

    return make


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    rows = {name: arguments(n, d, dtype, dtype, dtype) for name, (n, d) in _SHAPES.items()}
    rows |= {
        f"weight_{short(of)}": arguments(7, 91, dtype, of, of if with_bias else None)
        for of, with_bias in zip(FLOATS, (True, False, True, False), strict=True)
    }
    rows["widened"] = arguments(7, 91, dtype, torch.float32, torch.float32, widen=True)
    rows["no_weight"] = arguments(7, 91, dtype, None, None)
    rows["bias_alone"] = arguments(7, 91, dtype, None, dtype)
    return [OpCase(SPEC, f"{name}_{short(dtype)}", make) for name, make in rows.items()]


_SHAPES = {"odd": (37, 19), "even": (32, 128), "one_feature": (5, 1), "no_rows": (0, 5)}


def _strided() -> tuple[Any, ...]:
    x, weight, bias, eps, widen = arguments(9, 33)()
    return strided(x), strided(weight), strided(bias), eps, widen


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "column_slice", lambda: (matrix(6, 40)[:, 3:30], None, None, EPS, False)),
    OpCase(SPEC, "transposed_bfloat16", lambda: (matrix(24, 40, torch.bfloat16).t(), None, None, EPS, True)),
    OpCase(SPEC, "expanded", lambda: (matrix(1, 21).expand(6, 21), None, None, EPS, False)),
    OpCase(SPEC, "eps_counts", lambda: (1e-3 * matrix(5, 33), None, None, 1.0, False)),
    OpCase(SPEC, "far_from_zero", lambda: (matrix(5, 333) + 1000.0, None, None, EPS, False)),
    OpCase(SPEC, "constant_rows", lambda: (torch.full((3, 16), 2.0), torch.ones(16), torch.ones(16), 0.25, False)),
]
