"""Rows of `rms_norm_backward`: float64 and the error of plain PyTorch bound the error.

N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum
from typing import Any

import torch
from torch import Tensor

from memsave.ops.rms_norm import Style
from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, HALF, matrix, short, strided


def oracle(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """(N, D), (N, D), (N,), (D,) -> (N, D), (D,) or (0,), float64."""
    scale = torch.ones(x.shape[1]) if weight is None else weight.double() + (style == Style.ONE_PLUS)
    xhat, dxhat = x.double() * rstd.double()[:, None], dy.double() * scale
    dx = rstd.double()[:, None] * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
    if weight is None or not needs_dweight:
        return dx, torch.empty(0).double()
    # Summed exactly: torch's own sum of float64 rounds as much as what is checked.
    return dx, torch.tensor([fsum(column) for column in (dy.double() * xhat).t().tolist()]).double()


def plain(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    """The same in the dtype of rstd, rounded at the end."""
    dy, xhat = dy.to(rstd.dtype), x.to(rstd.dtype) * rstd[:, None]
    scale = torch.ones(x.shape[1]) if weight is None else weight.to(rstd.dtype) + (style == Style.ONE_PLUS)
    dxhat = (dy * scale).to(rstd.dtype)
    dx = rstd[:, None] * (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True))
    dweight = (dy * xhat).sum(0).to(weight.dtype) if weight is not None and needs_dweight else x.new_empty(0)
    return dx.to(x.dtype), dweight


SPEC = OpSpec("rms_norm_backward", oracle, plain, exact=False)


def arguments(
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = torch.float32,
    style: Style = Style.CAST_THEN_SCALE,
    dy_dtype: torch.dtype | None = None,
    rstd_dtype: torch.dtype = torch.float32,
    needs_dweight: bool = True,
) -> Callable[[], tuple[Any, ...]]:
    """`make` for dy and x (N, D), rstd (N,), weight (D,); dy is of the dtype of x where none is given."""

    def make() -> tuple[Any, ...]:
        x, dy = matrix(n, d, dtype), matrix(n, d, dy_dtype or dtype, value=5)
        rstd = torch.rsqrt(x.to(rstd_dtype).square().mean(-1) + 1e-5)
        weight = None if weight_dtype is None else matrix(1, d, weight_dtype, value=7)[0]
        return dy, x, rstd, weight, int(style), needs_dweight

    return make


_SHAPES = {"odd": (37, 19), "even": (64, 128), "one_row": (1, 33), "no_rows": (0, 5), "no_features": (3, 0)}


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {name: arguments(*shape, dtype, dtype, rstd_dtype=wide) for name, shape in _SHAPES.items()}
    rows |= {
        f"{style.name.lower()}{'' if needed else '_frozen'}": arguments(
            21, 35, dtype, dtype, style, rstd_dtype=wide, needs_dweight=needed
        )
        for style in Style
        for needed in (True, False)
    }
    rows["no_weight"] = arguments(21, 35, dtype, None, rstd_dtype=wide)
    cases = [OpCase(SPEC, f"{name}_{short(dtype)}", make) for name, make in rows.items()]
    # Several blocks of rows, the last one smaller, each with rows left over; and several blocks of a row.
    tall, long = arguments(1300, 67, dtype, dtype, rstd_dtype=wide), arguments(19, 2151, dtype, dtype, rstd_dtype=wide)
    return [
        *cases,
        OpCase(SPEC, f"tall_{short(dtype)}", tall, large=True),
        OpCase(SPEC, f"long_{short(dtype)}", long, large=True),
    ]


def _strided() -> tuple[Any, ...]:
    dy, x, rstd, weight, style, needs_dweight = arguments(9, 33)()
    return strided(dy), strided(x), strided(rstd), strided(weight), style, needs_dweight


def _expanded() -> tuple[Any, ...]:
    dy, *others = arguments(6, 21)()
    return (dy[:1, :1].expand(6, 21), *others)


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    *(OpCase(SPEC, f"{short(h)}_wide_dy", arguments(21, 35, h, torch.float32, dy_dtype=torch.float32)) for h in HALF),
    OpCase(SPEC, "float64_in_float32", arguments(21, 35, torch.float64, torch.float64)),
    # Sums over many rows, whose rounding errors must not grow with their number.
    OpCase(SPEC, "many_rows", arguments(50_000, 16), large=True),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "expanded", _expanded),
]
