"""Rows of `pq_table`: integers, and steps, the same bits from every implementation.

With these numbers products and their sums are exact in float32 in any order; what rounds afterwards is said in the op's
docstring. B sequences, H heads, R rows, M subspaces of d features, C codewords.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, generator, short, strided
from .pq_encode import LAYOUTS, halves, laid_out

FLOAT32 = numpy.float32


def oracle(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Products in float64, and then the roundings of float32, one by one."""
    heads, subspaces, codewords, features = codebook.shape
    rows = query.float().double().numpy().reshape(*query.shape[:3], subspaces, features)
    products = numpy.einsum("bhrmd,hmcd->bhrmc", rows, codebook.double().numpy()).astype(FLOAT32)
    low, high = products.min(-1), products.max(-1)
    total = (high - low).astype(numpy.float64).sum(-1).astype(FLOAT32)  # exact
    factor = FLOAT32(255) / numpy.maximum(total, FLOAT32(1e-30))
    scaled = (products - low[..., None]) * factor[..., None, None]
    assert scaled.dtype == FLOAT32
    table = numpy.minimum(numpy.floor(scaled), 255).astype(numpy.uint8)
    padded = numpy.concatenate((table, numpy.repeat(table[..., :1], 16 - codewords, axis=-1)), -1)
    return torch.from_numpy(padded), torch.from_numpy(total / FLOAT32(255))


SPEC = OpSpec("pq_table", oracle)


def arguments(
    B: int = 2,
    H: int = 2,
    R: int = 9,
    M: int = 4,
    C: int = 16,
    d: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    most: int = 6,
) -> tuple[Any, ...]:
    """Multiples of 1/2, of size most / 2 at most."""
    codebook = halves(H, M, C, d, most=most, value=1)
    query = laid_out(halves(B, H, R, M * d, most=most).to(dtype), layout)
    return query, strided(codebook) if layout == "strided" else codebook


def any_numbers(R: int = 40) -> tuple[Any, ...]:
    """One product of numbers of 12 bits for each entry: exact, but a difference of two may round."""
    query, codebook = (
        torch.randint(-(2**11), 2**11, shape, generator=generator(7)).float() * 2.0**-9
        for shape in ((2, 3, R, 1), (3, 1, 16, 1))
    )
    return query, codebook


def all_equal() -> tuple[Any, ...]:
    """Queries of zeros, and one subspace whose codewords are equal: products that do not differ."""
    query, codebook = arguments()
    query[:, :, ::2] = 0
    codebook[:, 1] = 1.0
    return query, codebook


def one_subspace_differs() -> tuple[Any, ...]:
    """All 255 steps in one subspace, of 255 products that lie a step apart, as far as there are codewords."""
    codebook = torch.zeros(1, 3, 16, 1)
    codebook[:, 1, :, 0] = torch.arange(16) * 17
    return torch.tensor([[1.0, 1.0, 1.0], [1.0, -3.0, 1.0]])[None, None], codebook


def thirds() -> tuple[Any, ...]:
    """Shares of 1/3, 1/5, 1/15 and so on of 255: quotients that are integers, but for their roundings."""
    codebook = torch.arange(16.0).view(1, 1, 16, 1).repeat(1, 3, 1, 1) * torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    weights = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [3, 0, 7], [17, 0, 1], [0, 5, 1], [11, 3, 2.0]])
    return weights[None, None], codebook


def tiny_and_huge() -> tuple[Any, ...]:
    """Below 1e-30 products count as equal; above, all scales give the same table."""
    query, codebook = arguments(R=6)
    return query * torch.tensor([2.0**e for e in (-120, -90, -40, 0, 60, 100)])[:, None], codebook


_ROWS: dict[str, dict[str, Any]] = {
    "one_subspace": {"M": 1},
    "one_feature": {"d": 1, "M": 6},
    "one_of_both": {"d": 1, "M": 1, "H": 1, "C": 5},
    "one_codeword": {"C": 1, "M": 3},
    "two_codewords": {"C": 2, "d": 3},
    "wide_features": {"d": 128, "M": 2, "R": 5},
    "features_of_16": {"d": 16},
    "most_subspaces": {"M": 64, "d": 2},
    "63_subspaces": {"M": 63, "d": 1, "C": 9},
    "large_numbers": {"most": 400, "M": 8},
    "one_row": {"R": 1},
    "17_rows": {"R": 17, "M": 3, "d": 5},
    "no_rows": {"R": 0},
    "no_sequences": {"B": 0},
    "no_heads": {"H": 0},
    **{layout: {"layout": layout, "M": 3, "R": 19} for layout in LAYOUTS[1:]},
    "transposed_half": {"layout": "transposed", "dtype": torch.bfloat16, "R": 33},
}
_LARGE: dict[str, dict[str, Any]] = {
    "many_rows": {"R": 701, "M": 8, "d": 8, "H": 3, "most": 100},
    "many_rows_half": {"R": 600, "M": 16, "d": 4, "dtype": torch.float16, "layout": "transposed"},
    "many_heads": {"B": 7, "H": 11, "R": 30, "M": 5, "C": 11, "d": 3},
}

CASES = [
    *(OpCase(SPEC, f"odd_{short(t)}", partial(arguments, B=1, H=3, R=5, M=3, C=7, d=5, dtype=t)) for t in FLOATS),
    *(OpCase(SPEC, name, partial(arguments, **settings)) for name, settings in _ROWS.items()),
    OpCase(SPEC, "any_numbers", any_numbers),
    OpCase(SPEC, "all_equal", all_equal),
    OpCase(SPEC, "one_subspace_differs", one_subspace_differs),
    OpCase(SPEC, "thirds", thirds),
    OpCase(SPEC, "tiny_and_huge", tiny_and_huge),
    *(OpCase(SPEC, name, partial(arguments, **settings), large=True) for name, settings in _LARGE.items()),
]
