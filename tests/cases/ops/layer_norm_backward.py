"""Rows of `layer_norm_backward`: float64 and the error of plain PyTorch bound the error.

N rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from math import fsum
from typing import Any

import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, HALF, matrix, short, strided


def oracle(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D), (N, D), (N,), (D,) -> (N, D), and (D,) or (0,) twice; float64, the sums exact."""
    dxhat = dy.double() * (1.0 if weight is None else weight.double())
    xhat = (x.double() - x.double().mean(-1, keepdim=True)) * rstd.double()[:, None]
    dx = dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True)
    sums = [
        torch.tensor([fsum(column) for column in terms.t().tolist()] if needed else []).double()
        for terms, needed in ((dy.double() * xhat, needs_dweight), (dy.double(), needs_dbias))
    ]
    return dx * rstd.double()[:, None], sums[0], sums[1]


def plain(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """torch's own gradients of its `layer_norm`, in the dtype of rstd and rounded at the end."""
    wide, d = rstd.dtype, x.shape[1]
    rows, scale = x.to(wide), torch.ones(d, dtype=wide) if weight is None else weight.to(wide)
    if not x.numel():
        return torch.zeros_like(x), *(torch.zeros(d if n else 0, dtype=wide) for n in (needs_dweight, needs_dbias))
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(wide).contiguous(),
        rows.contiguous(),
        [d],
        rows.mean(-1, keepdim=True),
        rstd[:, None].contiguous(),
        scale.contiguous(),
        scale.contiguous(),
        [True] * 3,
    )
    return dx.to(x.dtype), dweight if needs_dweight else rstd[:0], dbias if needs_dbias else rstd[:0]


SPEC = OpSpec("layer_norm_backward", oracle, plain, exact=False)


def arguments(
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = torch.float32,
    dy_dtype: torch.dtype | None = None,
    rstd_dtype: torch.dtype = torch.float32,
    needs: tuple[bool, bool] = (True, True),
) -> Callable[[], tuple[Any, ...]]:
    """`make` for dy and x (N, D), rstd (N,), weight (D,); dy is of the dtype of x where none is given."""

    def make() -> tuple[Any, ...]:
        x, dy = matrix(n, d, dtype) + 0.5, matrix(n, d, dy_dtype or dtype, value=5)
        centered = x.to(rstd_dtype) - x.to(rstd_dtype).mean(-1, keepdim=True)
        rstd = torch.rsqrt(centered.square().mean(-1) + 1e-5)
        weight = None if weight_dtype is None else matrix(1, d, weight_dtype, value=7)[0]
        return dy, x, rstd, weight, *needs

    return make


_SHAPES = {"odd": (37, 19), "even": (64, 128), "one_row": (1, 33), "no_rows": (0, 5), "no_features": (3, 0)}
_NEEDS = {"frozen": (False, False), "weight_alone": (True, False), "bias_alone": (False, True)}


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = {name: arguments(*shape, dtype, dtype, rstd_dtype=wide) for name, shape in _SHAPES.items()}
    rows |= {name: arguments(21, 35, dtype, dtype, rstd_dtype=wide, needs=n) for name, n in _NEEDS.items()}
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
    dy, x, rstd, weight, *needs = arguments(9, 33)()
    return strided(dy), strided(x), strided(rstd), strided(weight), *needs


def _expanded() -> tuple[Any, ...]:
    dy, *others = arguments(6, 21, torch.float16)()
    return (dy[:1, :1].expand(6, 21), *others)


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    *(OpCase(SPEC, f"{short(h)}_wide_dy", arguments(21, 35, h, torch.float32, dy_dtype=torch.float32)) for h in HALF),
    *(OpCase(SPEC, f"{short(h)}_many_rows", arguments(50_000, 16, h, h), large=True) for h in HALF),
    OpCase(SPEC, "float64_in_float32", arguments(21, 35, torch.float64, torch.float64)),
    OpCase(SPEC, "strided", _strided),
    OpCase(SPEC, "expanded", _expanded),
]
