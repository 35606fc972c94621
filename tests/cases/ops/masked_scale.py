"""Rows of `masked_scale`, which rounds each product once: the bits follow from float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, matrix, packed, short, strided


def oracle(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """(N, D): the product in a type where none of its bits are lost, then rounded."""
    mask = np.unpackbits(bits.numpy(), axis=-1, bitorder="little")[:, : x.shape[1]]
    if x.dtype == torch.float64:
        return x * (torch.from_numpy(mask).double() * scale)
    product = x.double() * (torch.from_numpy(mask).double() * torch.tensor(scale).double())
    return product.to(torch.float32).to(x.dtype)


SPEC = OpSpec("masked_scale", oracle)
SCALE = 1 / 0.9


def _args(n: int, d: int, dtype: torch.dtype, kept: float = 0.9) -> Callable[[], tuple[Any, ...]]:
    return lambda: (matrix(n, d, dtype), packed(n, d, kept), SCALE)


def _cases_of_dtype(dtype: torch.dtype) -> list[OpCase]:
    shapes = {"odd": (37, 19), "whole_bytes": (20, 64), "narrow": (9, 3), "no_rows": (0, 5), "no_features": (4, 0)}
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0, -1.0, 6e4, 1e-7, 3e38, 1e-45]]).to(dtype)
    return [
        *(OpCase(SPEC, f"{name}_{short(dtype)}", _args(*shape, dtype)) for name, shape in shapes.items()),
        OpCase(SPEC, f"not_finite_{short(dtype)}", lambda: (special.expand(2, 9), packed(2, 9, 0.5), 2.0)),
        OpCase(SPEC, f"many_{short(dtype)}", _args(60, 2 * 1024 + 13, dtype), large=True),
    ]


CASES = [
    *(case for dtype in FLOATS for case in _cases_of_dtype(dtype)),
    OpCase(SPEC, "transposed", lambda: (matrix(24, 40).t(), packed(40, 24), SCALE)),
    OpCase(SPEC, "transposed_bfloat16", lambda: (matrix(24, 40, torch.bfloat16).t(), packed(40, 24), SCALE)),
    OpCase(SPEC, "strided", lambda: (strided(matrix(9, 33)), strided(packed(9, 33)), SCALE)),
    OpCase(SPEC, "padding_is_ignored", lambda: (matrix(5, 9), torch.full((5, 2), 255, dtype=torch.uint8), SCALE)),
]
