"""Rows of `pq_encode`: codes, the same from every implementation.

Numbers are mostly small multiples of a half, with which float32 computes exactly in any order, so that equal distances
are equal everywhere; the others lie close to one codeword. B sequences, H heads, S keys, M subspaces of d features, C
codewords.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, generator, short, strided

LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "sliced")


def oracle(x: Tensor, codebook: Tensor) -> Tensor:
    """Distances of float32 numbers to every codeword, in float64, and the first of the least."""
    heads, subspaces, _, features = codebook.shape
    batch, _, keys, _ = x.shape
    parts = x.float().double().numpy().reshape(batch, heads, keys, subspaces, 1, features)
    differences = parts - codebook.double().numpy()[None, :, None]  # (B, H, S, M, C, d)
    codes = (differences**2).sum(-1).argmin(-1).astype(numpy.uint8)
    packed = numpy.zeros((batch, heads, (subspaces + 1) // 2, keys), dtype=numpy.uint8)
    for m in range(subspaces):
        packed[:, :, m // 2] |= codes[..., m] << (4 if m % 2 else 0)
    return torch.from_numpy(packed)


SPEC = OpSpec("pq_encode", oracle)


def halves(*shape: int, most: int = 6, value: int = 0) -> Tensor:
    """Random multiples of 1/2, of size most / 2 at most: exact in all dtypes, as are sums of their products."""
    return torch.randint(-most, most + 1, shape, generator=generator(value + sum(shape))).float() / 2


def laid_out(x: Tensor, layout: str) -> Tensor:
    """(B, H, S, D) with the values of x, but for "expanded", as modules or slices of other tensors give it."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":
        return strided(x)
    if layout == "expanded":
        return x[:1, :, :1].expand(x.shape)
    if layout == "sliced":  # the keys of a fused projection
        return torch.cat((x.flip(-1), x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]]
    return x


def arguments(
    B: int = 2,
    H: int = 2,
    S: int = 9,
    M: int = 4,
    C: int = 16,
    d: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> tuple[Any, ...]:
    codebook = halves(H, M, C, d, value=1)
    return laid_out(halves(B, H, S, M * d).to(dtype), layout), strided(codebook) if layout == "strided" else codebook


def near_codewords(dtype: torch.dtype = torch.float32, S: int = 50, C: int = 16, d: int = 8) -> tuple[Any, ...]:
    """Any numbers, but each key far nearer to one codeword than to the others."""
    codebook = torch.randn(2, 3, C, d, generator=generator(3))
    chosen = torch.randint(C, (2, 2, S, 3), generator=generator(4))
    x = codebook[torch.arange(2)[:, None, None], torch.arange(3), chosen].flatten(-2)
    return (x + 0.03 * torch.randn(x.shape, generator=generator(5))).to(dtype), codebook


def equal_codewords() -> tuple[Any, ...]:
    """Every codeword is there three times over."""
    x, codebook = arguments(C=5, H=3)
    return x, codebook.repeat(1, 1, 3, 1)


def between_codewords() -> tuple[Any, ...]:
    """Midway between two codewords: of those the first is taken."""
    codebook = torch.tensor([4.0, 2.0, 0.0, -2.0]).view(1, 1, 4, 1).expand(1, 3, 4, 1)
    return torch.tensor([3.0, 1.0, -1.0, 5.0, -9.0, 0.5]).view(1, 1, 6, 1).expand(1, 1, 6, 3), codebook


def between_them_in_float32() -> tuple[Any, ...]:
    """In float64 the second codeword would be the nearer one."""
    x = torch.tensor([1 - 2.0**-40, 1 + 2.0**-40], dtype=torch.float64).view(1, 1, 2, 1)
    return x, torch.tensor([2.0, 0.0]).view(1, 1, 2, 1)


def far_from_zero() -> tuple[Any, ...]:
    """The lengths of the codewords decide; the products alone would choose another."""
    x, codebook = arguments(S=20)
    return x, codebook * torch.tensor([1.0, 8.0]).repeat(8)[:, None]


_ROWS: dict[str, dict[str, Any]] = {
    "one_subspace": {"M": 1},
    "one_feature": {"d": 1, "M": 6},
    "one_of_both": {"d": 1, "M": 1, "H": 1},
    "one_codeword": {"C": 1, "M": 3},
    "two_codewords": {"C": 2, "d": 3},
    "wide_features": {"d": 128, "M": 2, "S": 5},
    "features_of_16": {"d": 16, "M": 4},
    "most_subspaces": {"M": 64, "d": 2},
    "63_subspaces": {"M": 63, "d": 1, "C": 9},
    "one_key": {"S": 1},
    **{f"{keys}_keys": {"S": keys, "M": 5, "d": 2} for keys in (15, 16, 17, 64, 65)},
    "no_keys": {"S": 0},
    "no_sequences": {"B": 0},
    "no_heads": {"H": 0},
    **{layout: {"layout": layout, "M": 3, "S": 19} for layout in LAYOUTS[1:]},
    "transposed_half": {"layout": "transposed", "dtype": torch.bfloat16, "S": 33},
}
_LARGE: dict[str, dict[str, Any]] = {
    "many_keys": {"S": 3001, "M": 8, "d": 8, "H": 3},
    "many_keys_half": {"S": 2500, "M": 16, "d": 4, "dtype": torch.float16, "layout": "transposed"},
    "many_heads": {"B": 7, "H": 11, "S": 70, "M": 5, "C": 11, "d": 3},
}

CASES = [
    *(OpCase(SPEC, f"odd_{short(t)}", partial(arguments, B=1, H=3, S=5, M=3, C=7, d=5, dtype=t)) for t in FLOATS),
    *(OpCase(SPEC, f"near_codewords_{short(t)}", partial(near_codewords, t)) for t in FLOATS),
    *(OpCase(SPEC, name, partial(arguments, **settings)) for name, settings in _ROWS.items()),
    OpCase(SPEC, "equal_codewords", equal_codewords),
    OpCase(SPEC, "between_codewords", between_codewords),
    OpCase(SPEC, "between_them_in_float32", between_them_in_float32),
    OpCase(SPEC, "far_from_zero", far_from_zero),
    *(OpCase(SPEC, name, partial(arguments, **settings), large=True) for name, settings in _LARGE.items()),
    OpCase(SPEC, "many_near_codewords", partial(near_codewords, S=4000), large=True),
]
