"""Rows of `low_rank_mlp`, whose sums round: float64 and the error of plain PyTorch bound the error.

N rows, F hidden units, ranks R1, R2 and R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave.ops.activation import Activation
from tests.harness import OpCase, OpSpec

from . import activation
from .inputs import FLOATS, matrix, short, strided


def oracle(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    kind: int,
) -> Tensor:
    """(N, R) float64, element by element of the hidden activations."""
    h = activation.oracle(_sum(p_gate, expand_gate, bias_gate), kind)
    if p_up is not None and expand_up is not None:
        h = h * _sum(p_up, expand_up, bias_up)
    return torch.einsum("nf,rf->nr", h, reduce_down.double())


def _sum(p: Tensor, expand: Tensor, bias: Tensor | None) -> Tensor:
    """(N, F) float64."""
    total = torch.einsum("nr,fr->nf", p.double(), expand.double())
    return total if bias is None else total + bias.double()


def plain(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    kind: int,
) -> Tensor:
    """As models write it."""
    h = activation.plain(F.linear(p_gate, expand_gate, bias_gate), kind)
    if p_up is not None and expand_up is not None:
        h = h * F.linear(p_up, expand_up, bias_up)
    return F.linear(h, reduce_down)


SPEC = OpSpec("low_rank_mlp", oracle, plain, exact=False)
TENSORS = 7


def arguments(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    kind: Activation = Activation.SILU,
    gated: bool = True,
    biases: bool = True,
) -> tuple[Any, ...]:
    """p_gate (N, R1), expand_gate (F, R1), bias_gate (F,), the same of up, reduce_down (R, F) for N, F, R1, R2, R."""
    n, f, r1, r2, r = sizes
    gate = _projection(n, f, r1, dtype, biases, 1)
    up = _projection(n, f, r2, dtype, biases, 4) if gated else (None, None, None)
    return (*gate, *up, matrix(r, f, dtype, value=7), int(kind))


def _projection(n: int, f: int, r: int, dtype: torch.dtype, biased: bool, value: int) -> tuple[Any, ...]:
    """The hidden activations vary by two or so, where the functions bend."""
    expand = (2 * matrix(f, r, value=value + 1) / max(1, r) ** 0.5).to(dtype)
    return matrix(n, r, dtype, value), expand, matrix(1, f, dtype, value + 2)[0] if biased else None


_SHAPES = {  # N, F, R1, R2, R
    "odd": (37, 75, 13, 19, 23),
    "even": (64, 128, 32, 64, 48),
    "one_row": (1, 21, 5, 5, 3),
    "rank_one": (9, 33, 1, 1, 1),
    "no_rows": (0, 21, 5, 7, 3),
    "no_units": (6, 0, 5, 7, 3),
    "no_ranks": (6, 21, 0, 0, 3),
    "no_results": (6, 21, 5, 7, 0),
}
# Of several tiles in every direction; widths of each list of tiles of the Triton kernel, and beyond them.
_LARGE = {"several_tiles": (161, 203, 71, 133, 150), "wide": (33, 70, 35, 67, 300)}
_WIDEST = {"wider": (35, 37, 21, 21, 600), "beyond_the_kernel": (3, 20, 5, 7, 1500)}


def _row(name: str, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, large: bool = False) -> OpCase:
    return OpCase(SPEC, f"{name}_{short(dtype)}", lambda: arguments(sizes, dtype), large)


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    forms = {
        f"{'gated' if gated else 'plain'}_{'biases' if biases else 'bare'}_{kind.name.lower()}": (kind, gated, biases)
        for kind in Activation
        for gated, biases in ((kind % 2 == 0, kind % 3 == 0), (kind % 2 == 1, True))
    }
    return [
        *(_row(name, sizes, dtype) for name, sizes in _SHAPES.items()),
        *(_row(name, sizes, dtype, large=True) for name, sizes in (_LARGE | _WIDEST).items()),
        *(
            OpCase(SPEC, f"{name}_{short(dtype)}", lambda form=form: arguments((19, 37, 11, 5, 7), dtype, *form))
            for name, form in forms.items()
        ),
    ]


def _changed(name: str, change: Callable[[Tensor], Tensor]) -> list[OpCase]:
    """Rows where one tensor after the other has other strides."""

    def make(changed: int) -> tuple[Any, ...]:
        args = arguments((23, 29, 9, 15, 17))
        return tuple(change(a) if i == changed else a for i, a in enumerate(args))

    return [OpCase(SPEC, f"{name}_{i}", lambda i=i: make(i)) for i in range(TENSORS)]  # type: ignore[misc]


def _transposed() -> tuple[Any, ...]:
    args = arguments((23, 29, 9, 15, 17))
    return tuple(a.t().contiguous().t() if isinstance(a, Tensor) and a.ndim == 2 else a for a in args)


def _one_bias(bias: int) -> tuple[Any, ...]:
    return tuple(None if i == bias else a for i, a in enumerate(arguments((11, 13, 5, 7, 3))))


def _chunks() -> tuple[Any, ...]:
    """Two chunks of rows of the reference, and some rows more."""
    return arguments((140, 16411, 3, 3, 5), kind=Activation.GELU)


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    *_changed("strided", strided),
    *_changed("expanded", lambda a: a[:1].expand(a.shape)),
    OpCase(SPEC, "transposed", _transposed),
    *(OpCase(SPEC, f"without_bias_{i}", lambda i=i: _one_bias(i)) for i in (2, 5)),  # type: ignore[misc]
    OpCase(SPEC, "tall_chunks", _chunks, large=True),
]
