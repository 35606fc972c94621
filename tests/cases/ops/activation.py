"""Rows of `activation`: every kind in every dtype, and the formulas that the tables of its neighbours use, too.

N rows, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave.ops.activation import Activation
from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, short, strided

_FORMULAS: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.SILU: lambda x: x / (1 + torch.exp(-x)),
    Activation.GELU: lambda x: 0.5 * x * torch.erfc(-x / math.sqrt(2)),
    Activation.GELU_TANH: lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    Activation.QUICK_GELU: lambda x: x / (1 + torch.exp(-1.702 * x)),
    Activation.RELU: lambda x: torch.where(x > 0, x, 0),
    Activation.RELU_SQUARED: lambda x: torch.where(x > 0, x * x, 0),
    Activation.MISH: lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
}
_PLAIN: dict[int, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
    Activation.RELU: F.relu,
    Activation.RELU_SQUARED: lambda x: F.relu(x).square(),
    Activation.MISH: F.mish,
}


def oracle(x: Tensor, kind: int) -> Tensor:
    """(N, F) -> (N, F), by the definition, in float64."""
    return _FORMULAS[kind](x.double())


def plain(x: Tensor, kind: int) -> Tensor:
    """As models write it."""
    return _PLAIN[kind](x)


SPEC = OpSpec("activation", oracle, plain, exact=False)


def numbers(n: int, f: int, dtype: torch.dtype, value: int = 1) -> Tensor:
    """(N, F), most of it where the functions bend, some where they are straight."""
    x = 3 * matrix(n, f, value=value)
    x[:, ::5] *= 6
    return x.to(dtype)


def table(spec: OpSpec, tensors: int) -> list[OpCase]:
    """The rows of an op on `tensors` matrices of one shape and dtype, and a kind."""

    def row(name: str, n: int, f: int, dtype: torch.dtype, kind: Activation, large: bool = False) -> OpCase:
        def make() -> tuple[Any, ...]:
            return (*(numbers(n, f, dtype, value) for value in range(tensors)), int(kind))

        return OpCase(spec, f"{name}_{kind.name.lower()}_{short(dtype)}", make, large)

    def changed(name: str, change: Callable[[Tensor], Tensor], kind: Activation, dtype: torch.dtype) -> list[OpCase]:
        """Rows where one matrix after the other has other strides."""

        def make(changed: int) -> tuple[Any, ...]:
            matrices = [numbers(6, 40, dtype, value) for value in range(tensors)]
            cut = [change(m) if i == changed else m[:, 3:30].contiguous() for i, m in enumerate(matrices)]
            return (*cut, int(kind))

        return [
            OpCase(spec, f"{name}_{i}_{kind.name.lower()}", lambda i=i: make(i))  # type: ignore[misc]
            for i in range(tensors)
        ]

    kinds = [Activation.SILU, Activation.GELU_TANH, Activation.QUICK_GELU]
    return [
        *(row("odd", 37, 19, dtype, kind) for dtype in FLOATS for kind in Activation),
        *(row("no_rows", 0, 5, dtype, Activation.GELU_TANH) for dtype in FLOATS),
        # Three pieces of a row in the C++ kernel, and elements left over.
        *(row("wide", 5, 2 * 1024 + 21, dtype, Activation.MISH, large=True) for dtype in FLOATS),
        *(case for kind in kinds for case in changed("column_slice", lambda m: m[:, 3:30], kind, torch.float32)),
        *(case for kind in kinds for case in changed("gaps", lambda m: strided(m[:, 3:30]), kind, torch.bfloat16)),
        *changed("transposed", lambda m: m[:, 3:30].t().contiguous().t(), Activation.GELU_TANH, torch.float32),
        *changed("expanded", lambda m: m[:1, 3:30].expand(6, 27), Activation.SILU, torch.float32),
    ]


CASES = table(SPEC, 1)
