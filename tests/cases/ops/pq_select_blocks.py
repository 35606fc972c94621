"""Rows of `pq_select_blocks`: integers, the same from every implementation.

B sequences, H heads, N query blocks, r representatives, S keys in blocks, M subspaces, K key blocks to keep.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import generator, strided
from .pq_select import MASKS, Mask, largest, limits, padded, random_codes, random_table, some, sums

ALWAYS = 2**62


def oracle(
    table: Tensor,
    weights: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> Tensor:
    """Block by block, in Python's integers."""
    batch, heads, blocks, representatives = table.shape[:4]
    keys = codes.shape[3]
    shown = numpy.ones((batch, heads, blocks, keys), dtype=bool)
    if mask is not None:
        shown &= mask.numpy()
    out = numpy.full((batch, heads, blocks, keep), -1, dtype=numpy.int32)
    for b, h, n in numpy.ndindex(batch, heads, blocks):
        first = position + n * block_size
        last = first + block_size - 1
        seen = shown[b, h, n] & limits(first, is_causal, window, keys)
        shares = [0] * -(-keys // block_size)
        for i in range(representatives):
            levels = sums(table[b, h, n, i], codes[b, h])
            given = numpy.where(seen, weights[b, h, n, i].numpy().astype(numpy.int64)[levels], 0)
            parts = [int(given[start : start + block_size].sum()) for start in range(0, keys, block_size)]
            shares = [share + 2**16 * part // max(1, sum(parts)) for share, part in zip(shares, parts, strict=True)]
        counting = [bool(seen[start : start + block_size].any()) for start in range(0, keys, block_size)]
        stand_in = range(first // block_size, last // block_size + 1) if local else ()
        for block in range(len(shares)):
            if block == 0 or block in stand_in:
                shares[block] = ALWAYS
            counting[block] |= block in stand_in
        out[b, h, n] = largest(numpy.array(shares), numpy.array(counting, dtype=bool), keep)
    return torch.from_numpy(out)


SPEC = OpSpec("pq_select_blocks", oracle, fixed=(16, 256))


def random_weights(*shape: int, most: int = 2**20) -> Tensor:
    """(..., 256) int32."""
    return torch.randint(most + 1, (*shape, 256), generator=generator(5 + sum(shape))).to(torch.int32)


def exponential_weights(*shape: int) -> Tensor:
    """(..., 256) int32, as a module gives them: growing with the sum, most of them small."""
    levels = torch.arange(256) * (0.02 + 0.2 * torch.rand(*shape, 1, generator=generator(6)))
    return (2**20 * (levels - levels[..., -1:]).exp()).to(torch.int32)


def arguments(
    B: int = 2,
    H: int = 2,
    N: int = 5,
    r: int = 2,
    S: int = 23,
    M: int = 4,
    block_size: int = 4,
    keep: int = 3,
    mask: Mask | None = None,
    is_causal: bool = False,
    window: int = 0,
    position: int = 0,
    local: bool = True,
    levels: int | None = None,
    weights: Callable[..., Tensor] = random_weights,
    layout: str = "contiguous",
) -> tuple[Any, ...]:
    table, codes = random_table(B, H, N, r, M, levels=levels), random_codes(B, H, M, S)
    given = weights(B, H, N, r)
    if layout == "strided":
        table, given, codes = strided(table), strided(given), strided(codes)
    if layout == "transposed":
        table = table.permute(2, 5, 0, 1, 4, 3).contiguous().permute(2, 3, 0, 5, 4, 1)
        given = given.permute(4, 2, 1, 0, 3).contiguous().permute(3, 2, 1, 4, 0)
        codes = codes.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    if layout == "expanded":
        table, codes = table[:, :1, :1].expand(table.shape), codes[:1].expand(codes.shape)
        given = given[:, :, :1, :1].expand(given.shape)
    shown = None if mask is None else mask(B, H, N, S)
    return table, given, codes, shown, is_causal, window, position, block_size, keep, local


def shares_round_down() -> tuple[Any, ...]:
    """Two representatives of 1/3 and 2/3: rounded down each, a block of theirs has less than one of equal weight."""
    codes = torch.arange(9, dtype=torch.uint8).view(1, 1, 1, 9)
    table = torch.arange(16, dtype=torch.uint8).expand(1, 1, 1, 2, 1, 16)
    weights = torch.zeros(1, 1, 1, 2, 256, dtype=torch.int32)
    weights[..., 0, 3:9] = torch.tensor([1, 0, 0, 1, 1, 0], dtype=torch.int32)
    weights[..., 1, 3:9] = torch.tensor([2, 0, 1, 0, 0, 0], dtype=torch.int32)
    return table, weights, codes, None, False, 0, 0, 1, 3, False


def one_weight() -> tuple[Any, ...]:
    """All weight of a representative on one key: a share of exactly 2^16."""
    table, weights, codes, *rest = arguments(S=40, weights=partial(random_weights, most=0))
    weights[:, :, :, :, 130] = 2**31 - 1
    table[:], codes[:] = 0, 0
    table[..., 0, 5] = 130
    codes[:, :, 0, 21] = 5
    return table, weights, codes, *rest


_ROWS: dict[str, dict[str, Any]] = {
    "odd": {"B": 1, "H": 3, "N": 5, "r": 1, "S": 9, "M": 5, "block_size": 3, "mask": some},
    "plain": {},
    "exponential": {"weights": exponential_weights, "S": 60, "keep": 4},
    "one_representative": {"r": 1},
    "five_representatives": {"r": 5, "S": 50},
    "keep_one": {"keep": 1},
    "keep_one_not_local": {"keep": 1, "local": False},
    "keep_all": {"keep": 6},
    "keep_more_than_there_are": {"keep": 11},
    "one_block": {"S": 4},
    "one_key": {"S": 1},
    "blocks_of_one": {"block_size": 1, "keep": 7, "N": 9},
    "blocks_of_16": {"block_size": 16, "S": 100},
    "blocks_of_32": {"block_size": 32, "S": 96},
    "blocks_of_64": {"block_size": 64, "S": 300, "weights": exponential_weights, "is_causal": True},
    "blocks_of_more_than_there_are": {"block_size": 64},
    "one_subspace": {"M": 1},
    "odd_subspaces": {"M": 7, "S": 40},
    "most_subspaces": {"M": 64, "S": 70},
    "ties": {"levels": 1, "S": 40},
    "few_weights": {"weights": partial(random_weights, most=1), "S": 60, "local": False},
    "weights_of_zero": {"weights": partial(random_weights, most=0), "local": False},
    "large_weights": {"weights": partial(random_weights, most=2**31 - 2), "S": 90},
    "no_blocks": {"N": 0},
    "no_keys": {"S": 0},
    "no_sequences": {"B": 0},
    "no_heads": {"H": 0},
    **{f"mask_{name}": {"mask": mask, "B": 3, "N": 6} for name, mask in MASKS.items()},
    "mask_of_no_keys": {"mask": lambda B, H, R, S: torch.ones(B, H, R, S, dtype=torch.bool), "S": 0},
    "causal": {"is_causal": True, "N": 6},
    "causal_not_local": {"is_causal": True, "N": 6, "local": False},
    "causal_later": {"is_causal": True, "position": 10, "keep": 4},
    "causal_beyond": {"is_causal": True, "position": 100},
    "causal_before": {"is_causal": True, "position": -3, "N": 6},
    "causal_before_all": {"is_causal": True, "position": -30},
    "between_blocks": {"is_causal": True, "position": 6, "N": 4, "keep": 4, "block_size": 5, "S": 41},
    "window_of_one": {"is_causal": True, "window": 1, "N": 6},
    "window": {"is_causal": True, "window": 9, "N": 8, "S": 31, "position": 1},
    "window_beyond": {"is_causal": True, "window": 4, "position": 24},
    "window_not_causal": {"window": 5, "position": 6, "local": False},
    "window_before": {"is_causal": True, "window": 6, "position": -7, "N": 7},
    "padded_and_causal": {"B": 3, "mask": partial(padded, expanded=True), "is_causal": True, "N": 6},
    "everything": {"mask": some, "is_causal": True, "window": 21, "position": 3, "N": 10, "S": 47, "levels": 4},
    **{layout: {"layout": layout, "M": 5, "S": 40} for layout in ("strided", "transposed", "expanded")},
}
_LARGE: dict[str, dict[str, Any]] = {
    "many_keys": {"S": 4001, "block_size": 32, "keep": 17, "weights": exponential_weights, "N": 6, "M": 8},
    "many_causal": {"S": 1100, "N": 69, "block_size": 16, "keep": 9, "is_causal": True, "B": 1, "M": 8},
    "many_masked": {"S": 2100, "N": 33, "block_size": 64, "keep": 7, "mask": some, "M": 3, "H": 3},
}

CASES = [
    *(OpCase(SPEC, name, partial(arguments, **settings)) for name, settings in _ROWS.items()),
    OpCase(SPEC, "shares_round_down", shares_round_down),
    OpCase(SPEC, "one_weight", one_weight),
    *(OpCase(SPEC, name, partial(arguments, **settings), large=True) for name, settings in _LARGE.items()),
]
