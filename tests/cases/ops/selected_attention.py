"""Rows of `selected_attention`, which rounds: float64 and the error of plain PyTorch bound the error.

B sequences, h query and kv key/value heads, R queries, S keys, head sizes D and E; N blocks of queries, K key blocks
for each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, generator, short, strided
from .pq_select import MASKS, Mask, limits, padded, some
from .sddmm import longer

NONE = float("-inf")


def visible(
    query: Tensor,
    key: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
) -> Tensor:
    """(B, h, R, S) bool: which keys each query of each head attends to."""
    (batch, heads, rows, _), (groups, keys) = query.shape, key.shape[1:3]
    within = [limits(position + r, is_causal, window, keys) for r in range(rows)]
    seen = torch.from_numpy(numpy.array(within, dtype=bool).reshape(rows, keys)).expand(batch, groups, rows, keys)
    if mask is not None:
        seen = seen & mask
    block_of_key = torch.arange(keys) // block_size
    chosen = (indices[..., None, :] == block_of_key[:, None]).any(-1)  # (B, kv, N, S)
    seen = seen & chosen.repeat_interleave(block_size, 2)[:, :, :rows]
    return seen.repeat_interleave(heads // groups, 1)


def oracle(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """All scores of one head at a time, in float64, or in more where float64 is what is checked."""
    *how, scale = rest
    seen = visible(query, key, *how).numpy()
    q, k, v = map(wider, (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    output = numpy.zeros((*query.shape[:3], value.shape[3]))
    logsumexp = numpy.full(query.shape[:3], NONE)
    for b, i in numpy.ndindex(query.shape[:2]):
        p, peak, total = exponentials(q[b, i] @ k[b, i // repeats].T * scale, seen[b, i])
        output[b, i] = p @ v[b, i // repeats] / numpy.maximum(total, 1)
        with numpy.errstate(divide="ignore"):
            logsumexp[b, i] = (numpy.log(total) + peak)[:, 0]
    return torch.from_numpy(output), torch.from_numpy(logsumexp)


def wider(x: Tensor) -> Any:
    return longer(x) if x.dtype == torch.float64 else x.double().numpy()


def exponentials(scores: Any, seen: numpy.ndarray) -> tuple[Any, Any, Any]:
    """exp(score - peak) where seen, the peak of each row (0 where nothing is seen) and the sum."""
    scores = numpy.where(seen, scores, NONE)
    peak = scores.max(-1, keepdims=True, initial=NONE)
    peak = numpy.where(numpy.isfinite(peak), peak, 0)
    p = numpy.exp(scores - peak)
    return p, peak, p.sum(-1, keepdims=True)


def plain(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Dense attention with a mask in the dtype of query; log-sum-exp of its scores in float32."""
    *how, scale = rest
    seen, repeats = visible(query, key, *how), query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query @ keys.mT * scale).masked_fill(~seen, NONE)
    unseen = ~seen.any(-1, keepdim=True)
    shares = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return shares @ values, scores.to(torch.promote_types(query.dtype, torch.float32)).logsumexp(-1)


SPEC = OpSpec("selected_attention", oracle, plain, exact=False)


def chosen_blocks(shape: tuple[int, int, int], kept: int, count: int, fewer: bool = True) -> Tensor:
    """(B, kv, N, K) int32, ascending, without repeats: K of the numbers below `count`, with `fewer` in every third row
    less, and none in one row of a head."""
    order = torch.rand(*shape, count, generator=generator(sum(shape) + kept)).argsort(-1)[..., :kept]
    found = torch.full((*shape, kept), count)
    found[..., : order.shape[-1]] = order
    if fewer:
        found[:, :, 1::3, kept // 2 :] = count
        found[:1, :1, -1:] = count
    found = found.sort(-1).values
    return torch.where(found == count, -1, found).to(torch.int32)


def arguments(
    B: int = 2,
    h: int = 4,
    kv: int = 2,
    R: int = 19,
    S: int = 23,
    D: int = 16,
    E: int | None = None,
    keep: int = 3,
    block_size: int = 1,
    dtype: torch.dtype = torch.float32,
    mask: Mask | None = None,
    is_causal: bool = False,
    window: int = 0,
    position: int = 0,
    layout: str = "contiguous",
    fewer: bool = True,
    spread: float = 0.6,
) -> tuple[Any, ...]:
    """The positional arguments; queries of a standard deviation of `spread`, so that scores, and errors, stay small."""
    drawn = generator(B + h + R + S + D)

    def draw(heads: int, length: int, size: int, by: float = 1.0) -> Tensor:
        x = (by * torch.randn(B, heads, length, size, generator=drawn)).to(dtype)
        if layout == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "turned":
            return x.mT.contiguous().mT
        if layout == "expanded":
            return x[:1].expand(x.shape) if length == S else x[:, :1].expand(x.shape)
        return strided(x) if layout == "strided" else x

    size = D if E is None else E
    tensors = draw(h, R, D, spread), draw(kv, S, D), draw(kv, S, size)
    indices = chosen_blocks((B, kv, -(-R // block_size)), keep, -(-S // block_size), fewer)
    indices = strided(indices) if layout == "strided" else indices
    given = None if mask is None else mask(B, kv, R, S)
    return *tensors, indices, given, is_causal, window, position, block_size, max(1, D) ** -0.5


def growing_scores(block_size: int = 4) -> tuple[Any, ...]:
    """The largest score comes last, far above the others: what was summed before must shrink."""
    query, key, *rest = arguments(S=200, keep=50, block_size=block_size, fewer=False)
    return query, key * torch.linspace(0.2, 20, 200)[:, None], *rest


def huge_scores(dtype: torch.dtype) -> tuple[Any, ...]:
    """Scores of thousands: beyond float16 before they are scaled."""
    query, key, value, *rest = arguments(dtype=dtype, block_size=4, S=40, D=16, keep=5, spread=60.0)
    return query, (key * 60).to(dtype), value, *rest


def one_score() -> tuple[Any, ...]:
    """A single key each: shares of 1."""
    return arguments(keep=1, fewer=False, R=11)


EVERY_DTYPE: dict[str, dict[str, Any]] = {
    "odd": {"B": 1, "h": 3, "kv": 1, "R": 25, "S": 9, "D": 7, "E": 13, "block_size": 2, "mask": some},
    "single_keys": {"keep": 9, "D": 24, "S": 33},
    "blocks": {"block_size": 16, "R": 70, "S": 83, "D": 32, "is_causal": True, "position": 13},
    "masked": {"block_size": 8, "R": 20, "S": 40, "mask": some, "h": 6},
}
ROWS: dict[str, dict[str, Any]] = {
    "one_group": {"h": 3, "kv": 3, "block_size": 4},
    "one_key_value_head": {"h": 3, "kv": 1, "block_size": 4},
    "groups_of_three": {"h": 6, "kv": 2, "block_size": 4},
    "single_keys_groups_of_three": {"h": 6, "kv": 2, "keep": 8},
    "single_keys_all": {"keep": 23, "fewer": False},
    "single_keys_more_than_there_are": {"keep": 30},
    "blocks_all": {"keep": 6, "fewer": False, "block_size": 4},
    "blocks_more_than_there_are": {"keep": 9, "block_size": 4},
    "keep_none": {"keep": 0},
    "keep_no_blocks": {"keep": 0, "block_size": 4},
    "one_key": {"S": 1, "keep": 1},
    "one_block": {"block_size": 32, "keep": 1},
    "one_query": {"R": 1, "block_size": 8},
    "one_feature": {"D": 1, "block_size": 4},
    "one_feature_of_values": {"E": 1, "block_size": 4},
    "more_features_of_values": {"E": 20, "block_size": 4},
    "blocks_of_2": {"block_size": 2},
    "blocks_of_3": {"block_size": 3, "R": 10, "is_causal": True, "position": 11},
    "blocks_of_32": {"block_size": 32, "R": 70, "S": 97, "keep": 2, "is_causal": True, "position": 20},
    "blocks_of_64": {"block_size": 64, "R": 65, "S": 127, "D": 64, "keep": 2, "is_causal": True, "position": 60},
    "blocks_of_128": {"block_size": 128, "R": 130, "S": 200, "B": 1, "keep": 2, "is_causal": True},
    **{f"head_of_{d}": {"D": d, "block_size": 16, "R": 17, "S": 40, "keep": 2} for d in (40, 80, 128, 256)},
    **{f"single_keys_head_of_{d}": {"D": d, "R": 5, "S": 40, "keep": 17} for d in (40, 80, 128, 256)},
    "causal": {"block_size": 4, "R": 23, "is_causal": True, "keep": 4},
    "causal_later": {"block_size": 4, "is_causal": True, "position": 4, "keep": 4},
    "causal_beyond": {"block_size": 4, "is_causal": True, "position": 60},
    "causal_before": {"block_size": 4, "R": 12, "is_causal": True, "position": -5, "keep": 6},
    "causal_before_all": {"block_size": 4, "is_causal": True, "position": -50},
    "causal_more_rows_than_keys": {"block_size": 4, "R": 30, "S": 11, "is_causal": True},
    "between_blocks": {"block_size": 5, "R": 23, "S": 41, "position": 12, "is_causal": True, "keep": 6},
    "window_of_one": {"block_size": 4, "R": 23, "is_causal": True, "window": 1, "keep": 6},
    "window": {"block_size": 4, "R": 30, "is_causal": True, "window": 7, "position": 2, "keep": 6},
    "window_of_a_block": {"block_size": 4, "R": 23, "is_causal": True, "window": 4, "keep": 6},
    "window_beyond": {"block_size": 4, "is_causal": True, "window": 3, "position": 30},
    "window_before": {"block_size": 4, "R": 20, "is_causal": True, "window": 5, "position": -7, "keep": 6},
    "window_not_causal": {"block_size": 4, "R": 20, "window": 5, "position": 3, "keep": 6},
    "window_of_more_than_there_are": {"block_size": 4, "R": 20, "is_causal": True, "window": 1000},
    **{f"mask_{name}": {"mask": mask, "B": 3, "R": 10, "block_size": 4, "keep": 5} for name, mask in MASKS.items()},
    "padded_and_causal": {"B": 3, "R": 23, "mask": padded, "is_causal": True, "block_size": 8},
    "everything": {
        **{"B": 2, "h": 6, "R": 29, "S": 45, "D": 12, "E": 9, "block_size": 4, "keep": 8},
        **{"mask": some, "is_causal": True, "window": 17, "position": 15},
    },
    "mask_of_no_keys": {"S": 0, "block_size": 4, "mask": padded},
    "no_keys": {"S": 0, "keep": 2},
    "no_keys_in_blocks": {"S": 0, "block_size": 4, "is_causal": True},
    "no_queries": {"R": 0},
    "no_queries_in_blocks": {"R": 0, "block_size": 4},
    "no_sequences": {"B": 0},
    "no_query_heads": {"h": 0},
    "no_features": {"D": 0, "E": 4, "block_size": 4},
    "no_features_of_values": {"E": 0, "block_size": 4},
    **{
        f"{layout}{name}": {"layout": layout, "R": 28, "S": 33, "keep": 5, **settings}
        for layout in ("transposed", "turned", "strided", "expanded")
        for name, settings in (("", {}), ("_blocks", {"block_size": 8, "mask": MASKS["strided"]}))
    },
    "transposed_blocks_whole": {"layout": "transposed", "R": 32, "S": 32, "block_size": 8, "dtype": torch.bfloat16},
}
LARGE: dict[str, dict[str, Any]] = {  # more than one chunk of plain PyTorch
    "many_single_keys": {"B": 1, "R": 340, "S": 420, "keep": 400, "D": 24, "spread": 1.5},
    "many_single_keys_half": {"R": 130, "S": 400, "keep": 40, "D": 64, "dtype": torch.bfloat16},
    "many_blocks": {"B": 1, "h": 6, "R": 500, "S": 500, "keep": 6, "block_size": 32, "is_causal": True, "D": 64},
    "many_blocks_half": {
        **{"B": 1, "R": 450, "S": 450, "keep": 5, "block_size": 64, "is_causal": True, "D": 64},
        **{"dtype": torch.float16, "layout": "transposed"},
    },
    "many_masked": {"B": 1, "h": 6, "R": 300, "S": 410, "keep": 20, "block_size": 16, "mask": some, "D": 24},
    "many_windows": {
        **{"B": 1, "h": 6, "R": 400, "S": 400, "keep": 16, "block_size": 16, "is_causal": True, "window": 90},
    },
}

OpRow = tuple[str, Callable[[], tuple[Any, ...]], bool]


def rows() -> list[OpRow]:
    """(name, `make`, large), those of the backward too."""
    return [
        *(
            (f"{name}_{short(t)}", partial(arguments, **row, dtype=t), False)
            for t in FLOATS
            for name, row in EVERY_DTYPE.items()
        ),
        *((name, partial(arguments, **row), False) for name, row in ROWS.items()),
        ("growing_scores", growing_scores, False),
        ("growing_scores_of_single_keys", partial(growing_scores, 1), False),
        *((f"huge_scores_{short(t)}", partial(huge_scores, t), False) for t in (torch.float16, torch.float32)),
        ("one_score", one_score, False),
        *((name, partial(arguments, **row), True) for name, row in LARGE.items()),
    ]


CASES = [OpCase(SPEC, name, make, large) for name, make, large in rows()]
