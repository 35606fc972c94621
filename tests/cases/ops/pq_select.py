"""Rows of `pq_select`: integers, the same from every implementation.

B sequences, H heads, R rows, S keys, M subspaces, K keys to keep.
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


def sums(table: Tensor, codes: Tensor) -> numpy.ndarray:
    """(..., M, 16), (P, S) -> (..., S): the entries of each key, added up."""
    entries, packed = table.numpy().astype(numpy.int64), codes.numpy()
    unpacked = (packed[m // 2] >> (4 if m % 2 else 0) & 15 for m in range(entries.shape[-2]))
    return sum(entries[..., m, :][..., code] for m, code in enumerate(unpacked))  # type: ignore[return-value]


def limits(own: Any, is_causal: bool, window: int, keys: int) -> numpy.ndarray:
    """(S,) bool: the keys within the limits of a query beside key `own`."""
    places = numpy.arange(keys)
    seen = numpy.ones(keys, dtype=bool)
    if is_causal:
        seen &= places <= own
    if window:
        seen &= own - places < window
    return seen


def largest(scores: numpy.ndarray, seen: numpy.ndarray, keep: int) -> list[int]:
    """Places of the largest numbers among those seen, of equal ones the later; ascending, -1 behind."""
    best = sorted(numpy.flatnonzero(seen).tolist(), key=lambda place: (-int(scores[place]), -place))[:keep]
    return sorted(best) + [-1] * (keep - len(best))


def oracle(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    """Row by row."""
    batch, heads, rows = table.shape[:3]
    keys = codes.shape[3]
    shown = numpy.ones((batch, heads, rows, keys), dtype=bool)
    if mask is not None:
        shown &= mask.numpy()
    out = numpy.full((batch, heads, rows, keep), -1, dtype=numpy.int32)
    for b, h in numpy.ndindex(batch, heads):
        scores = sums(table[b, h], codes[b, h])
        for r in range(rows):
            seen = shown[b, h, r] & limits(position + r, is_causal, window, keys)
            out[b, h, r] = largest(scores[r], seen, keep)
    return torch.from_numpy(out)


SPEC = OpSpec("pq_select", oracle, fixed=(16,))

Mask = Callable[[int, int, int, int], Tensor]


def random_table(*shape: int, levels: int | None = None, value: int = 0) -> Tensor:
    """(..., M) -> (..., M, 16) uint8: entries below `levels`, whose sums over M do not pass 255."""
    most = 255 // shape[-1] if levels is None else levels - 1
    return torch.randint(most + 1, (*shape, 16), generator=generator(value + sum(shape))).to(torch.uint8)


def random_codes(batch: int, heads: int, subspaces: int, keys: int, value: int = 1) -> Tensor:
    """(B, H, P, S) uint8, with four bits of zeros for the subspace that an odd number lacks."""
    shape = batch, heads, (subspaces + 1) // 2, keys
    codes = torch.randint(256, shape, generator=generator(value + keys)).to(torch.uint8)
    if subspaces % 2:
        codes[:, :, -1] &= 15
    return codes


def some(B: int, H: int, R: int, S: int, kept: float = 0.6) -> Tensor:
    """For each row of each head; the first row sees nothing, the last one key."""
    seen = torch.rand(B, H, R, S, generator=generator(2)) < kept
    seen[:, :, 0] = False
    seen[:, :, -1] = torch.arange(S) == S // 2
    return seen


def padded(B: int, H: int, R: int, S: int, left: bool = True, expanded: bool = False) -> Tensor:
    """Sequence b lacks b * S / (B - 1) keys on one side, the last one all."""
    place = torch.arange(S) if left else torch.arange(S).flip(0)
    seen = (place[None] >= (torch.arange(B) * S // max(1, B - 1))[:, None])[:, None, None]
    return seen.expand(B, H, R, S) if expanded else seen


def turned(B: int, H: int, R: int, S: int) -> Tensor:
    """Laid out as (S, R, B)."""
    return (torch.rand(S, R, B, 1, generator=generator(3)) < 0.5).permute(2, 3, 1, 0)


MASKS: dict[str, Mask] = {
    "of_rows_of_heads": some,
    "of_rows": lambda B, H, R, S: some(1, 1, R, S),
    "of_heads": lambda B, H, R, S: (torch.arange(H) % 2 == 0)[None, :, None, None],
    "of_keys_of_heads": lambda B, H, R, S: torch.rand(1, H, 1, S, generator=generator(4)) < 0.5,
    "along_rows": lambda B, H, R, S: (torch.arange(R) % 3 != 1)[None, None, :, None],
    "along_rows_expanded": lambda B, H, R, S: (torch.arange(R) % 3 != 1)[None, None, :, None].expand(B, H, R, S),
    "padded_left": padded,
    "padded_right": partial(padded, left=False),
    "padded_expanded": partial(padded, expanded=True),
    "turned": turned,
    "strided": lambda B, H, R, S: strided(some(B, H, R, S)),
    "of_one": lambda B, H, R, S: torch.ones(1, 1, 1, 1, dtype=torch.bool),
    "of_one_hidden": lambda B, H, R, S: torch.zeros(1, 1, 1, 1, dtype=torch.bool),
}


def arguments(
    B: int = 2,
    H: int = 2,
    R: int = 7,
    S: int = 23,
    M: int = 4,
    keep: int = 6,
    mask: Mask | None = None,
    is_causal: bool = False,
    window: int = 0,
    position: int = 0,
    levels: int | None = None,
    layout: str = "contiguous",
) -> tuple[Any, ...]:
    table, codes = random_table(B, H, R, M, levels=levels), random_codes(B, H, M, S)
    if layout == "strided":
        table, codes = strided(table), strided(codes)
    if layout == "transposed":
        table = table.permute(2, 4, 0, 1, 3).contiguous().permute(2, 3, 0, 4, 1)
        codes = codes.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    if layout == "expanded":
        table, codes = table[:, :1, :1].expand(table.shape), codes[:1].expand(codes.shape)
    given = None if mask is None else mask(B, H, R, S)
    return table, codes, given, is_causal, window, position, keep


def one_far_ahead() -> tuple[Any, ...]:
    """The largest sum, 255 from one subspace, is that of the first key, and all others are 0."""
    table = torch.zeros(1, 1, 3, 5, 16, dtype=torch.uint8)
    table[:, :, :, 4, 9] = 255
    codes = torch.zeros(1, 1, 3, 50, dtype=torch.uint8)
    codes[:, :, 2, 0] = 9
    return table, codes, None, False, 0, 0, 2


def beyond_the_signs() -> tuple[Any, ...]:
    """Sums about 128, where a signed byte would turn over."""
    table = torch.arange(120, 136, dtype=torch.uint8).expand(1, 1, 2, 1, 16).contiguous()
    return table, torch.arange(32, dtype=torch.uint8).view(1, 1, 1, 32) & 15, None, False, 0, 0, 5


_ROWS: dict[str, dict[str, Any]] = {
    "odd": {"B": 1, "H": 3, "R": 5, "S": 9, "M": 5, "keep": 3, "mask": some},
    "plain": {},
    "keep_one": {"keep": 1},
    "keep_all": {"keep": 23},
    "keep_all_but_one": {"keep": 22},
    "keep_more_than_there_are": {"keep": 40},
    "one_key": {"S": 1, "keep": 1},
    "one_key_of_two": {"S": 1, "keep": 2},
    "one_row": {"R": 1},
    "one_subspace": {"M": 1},
    "two_subspaces": {"M": 2},
    "odd_subspaces": {"M": 7},
    "most_subspaces": {"M": 64, "S": 70},
    "63_subspaces": {"M": 63, "S": 33},
    **{f"{keys}_keys": {"S": keys, "keep": 9, "M": 5} for keys in (15, 16, 17, 31, 32, 33, 64, 127, 129)},
    "ties": {"levels": 2, "M": 2, "S": 60, "keep": 20},
    "all_equal": {"levels": 1},
    "few_levels": {"levels": 3, "M": 3, "S": 100, "keep": 30, "is_causal": True},
    "no_rows": {"R": 0},
    "no_keys": {"S": 0},
    "no_sequences": {"B": 0},
    "no_heads": {"H": 0},
    **{f"mask_{name}": {"mask": mask, "B": 3, "R": 8} for name, mask in MASKS.items()},
    "mask_of_no_rows": {"mask": lambda B, H, R, S: torch.ones(B, H, R, S, dtype=torch.bool), "R": 0},
    "mask_of_no_keys": {"mask": lambda B, H, R, S: torch.ones(B, H, R, S, dtype=torch.bool), "S": 0},
    "causal": {"is_causal": True, "R": 23},
    "causal_later": {"is_causal": True, "position": 16},
    "causal_beyond": {"is_causal": True, "position": 40},
    "causal_before": {"is_causal": True, "position": -3},
    "causal_before_all": {"is_causal": True, "position": -30},
    "causal_more_rows_than_keys": {"is_causal": True, "R": 30, "S": 11, "keep": 4},
    "window_of_one": {"is_causal": True, "window": 1, "R": 23},
    "window_of_keep": {"is_causal": True, "window": 6, "R": 23},
    "window": {"is_causal": True, "window": 9, "R": 30, "position": 2},
    "window_before": {"is_causal": True, "window": 4, "position": -5, "R": 20},
    "window_beyond": {"is_causal": True, "window": 4, "position": 24},
    "window_not_causal": {"window": 5, "position": 10},
    "window_not_causal_before": {"window": 5, "position": -40},
    "window_of_more_than_there_are": {"is_causal": True, "window": 1000},
    "everything": {"mask": some, "is_causal": True, "window": 11, "position": 4, "R": 20, "levels": 4},
    **{layout: {"layout": layout, "M": 5, "S": 40} for layout in ("strided", "transposed", "expanded")},
}
_LARGE: dict[str, dict[str, Any]] = {
    "many_rows": {"R": 301, "S": 777, "M": 8, "keep": 97, "is_causal": True},
    "many_rows_masked": {"R": 300, "S": 530, "M": 6, "keep": 60, "mask": some, "H": 3, "levels": 7},
    "many_keys": {"R": 9, "S": 9001, "M": 16, "keep": 1000, "is_causal": True, "position": 9000, "B": 1},
    "many_ties": {"R": 65, "S": 2049, "M": 2, "keep": 257, "levels": 2, "is_causal": True, "position": 1990},
    "many_windows": {"R": 700, "S": 700, "M": 4, "keep": 20, "is_causal": True, "window": 128, "B": 1},
}

CASES = [
    *(OpCase(SPEC, name, partial(arguments, **settings)) for name, settings in _ROWS.items()),
    OpCase(SPEC, "one_far_ahead", one_far_ahead),
    OpCase(SPEC, "beyond_the_signs", beyond_the_signs),
    *(OpCase(SPEC, name, partial(arguments, **settings), large=True) for name, settings in _LARGE.items()),
]
