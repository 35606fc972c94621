"""Rows of `low_rank_attention`, which rounds: float64 and the error of plain PyTorch bound the error.

B sequences, h query and kv key/value heads, T queries, S keys, head size D, ranks Rk and Rv.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.harness import OpCase, OpSpec

from .inputs import FLOATS, generator, short, strided

NONE = float("-inf")


def plain(
    query: Tensor,
    key_latent: Tensor,
    key_factor: Tensor,
    key_bias: Tensor | None,
    value_latent: Tensor,
    value_factor: Tensor,
    value_bias: Tensor | None,
    scale: float,
    cos: Tensor | None,
    sin: Tensor | None,
    norm_weight: Tensor | None,
    norm_eps: float,
    mask: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """All keys and values rebuilt, then attention, in the dtype of the arguments."""
    _, h, queries, d = query.shape
    keys = F.linear(key_latent, key_factor, key_bias).unflatten(2, (-1, d)).transpose(1, 2)  # (B, kv, S, D)
    values = F.linear(value_latent, value_factor, value_bias).unflatten(2, (-1, d)).transpose(1, 2)
    if norm_weight is not None:
        keys = keys * torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + norm_eps) * norm_weight
    if cos is not None and sin is not None:
        low, high = keys.chunk(2, -1)
        keys = keys * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
    share = h // keys.shape[1]
    scores = query @ keys.repeat_interleave(share, 1).transpose(2, 3) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, NONE) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        ahead = torch.arange(keys.shape[2]) - torch.arange(queries)[:, None]
        scores = scores.masked_fill(ahead > keys.shape[2] - queries, NONE)
    unseen = (scores == NONE).all(-1, keepdim=True)
    shares = scores.masked_fill(unseen, 0.0).softmax(-1).masked_fill(unseen, 0.0)
    return (shares @ values.repeat_interleave(share, 1)).transpose(1, 2)


def oracle(*args: Any) -> Tensor:
    """In float64, head by head, values accumulated in rank space: (B, T, h, D)."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    query, key_latent, key_factor, key_bias, value_latent, value_factor, value_bias, scale = wide[:8]
    cos, sin, norm_weight, norm_eps, mask, is_causal = wide[8:]
    b, h, t, d = query.shape
    share, s = h * d // len(key_factor), key_latent.shape[1]
    bias = query.new_zeros(b, h, t, s)
    if mask is not None:
        bias = bias + (torch.where(mask, 0.0, NONE) if mask.dtype == torch.bool else mask)
    if is_causal:
        bias = bias + torch.full((t, s), NONE).double().triu(s - t + 1)
    heads = []
    for i in range(h):
        rows = slice(i // share * d, (i // share + 1) * d)
        keys = key_latent @ key_factor[rows].T + (0.0 if key_bias is None else key_bias[rows])
        if norm_weight is not None:
            keys = F.rms_norm(keys, (d,), norm_weight, norm_eps)
        if cos is not None:
            keys = keys * cos + torch.cat((-keys[..., d // 2 :], keys[..., : d // 2]), -1) * sin
        exponentials = (scale * query[:, i] @ keys.mT + bias[:, i]).double()
        peak = exponentials.amax(-1, keepdim=True).clamp(min=-1e300) if s else 0.0
        exponentials = (exponentials - peak).exp()
        total = exponentials.sum(-1, keepdim=True)
        latents = exponentials @ value_latent / total.clamp(min=1.0)
        added = 0.0 if value_bias is None else value_bias[rows] * (total > 0)
        heads.append(latents @ value_factor[rows].T + added)
    return torch.stack(heads, 2)


SPEC = OpSpec("low_rank_attention", oracle, plain, exact=False)


def angles(keys: int, d: int, batch: int = 1) -> Tensor:
    """(batch, S, D): as in a Llama, but for halves that differ, so that none can stand for the other."""
    places = torch.arange(keys) + 3 * torch.arange(batch)[:, None]
    half = places[..., None] * 100.0 ** (-torch.arange(d // 2) / (d // 2))
    return torch.cat((half, half + 0.3), -1)


def arguments(
    B: int = 1,
    h: int = 4,
    kv: int = 2,
    T: int = 1,
    S: int = 33,
    D: int = 16,
    Rk: int = 11,
    Rv: int = 13,
    dtype: torch.dtype = torch.float32,
    biases: bool = True,
    turned: bool = True,
    norm: bool = False,
    mask: Callable[[int, int, int, int], Tensor] | None = None,
    is_causal: bool = False,
    own_angles: bool = False,
) -> tuple[Any, ...]:
    """The positional arguments. The mask, of (B, h, T, S), is cast to dtype unless it is bool."""
    drawn = generator(B + h + T + S + D)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=drawn).to(dtype)

    tensors = draw(B, h, T, D), draw(B, S, Rk), draw(kv * D, Rk) / max(1, Rk) ** 0.5, draw(kv * D)
    values = draw(B, S, Rv), draw(kv * D, Rv) / max(1, Rv) ** 0.5, draw(kv * D)
    weight = draw(D)
    angle = angles(S, D, B if own_angles else 1) if turned else None
    given = None if mask is None else mask(B, h, T, S)
    return (
        *tensors[:3],
        tensors[3] if biases else None,
        *values[:2],
        values[2] if biases else None,
        D**-0.5,
        None if angle is None else angle.cos().to(dtype),
        None if angle is None else angle.sin().to(dtype),
        weight if norm else None,
        1e-6,
        given if given is None or given.dtype == torch.bool else given.to(dtype),
        is_causal,
    )


def some(B: int, h: int, T: int, S: int) -> Tensor:
    """Bool, for all heads, with a query that sees nothing."""
    seen = torch.rand(B, 1, T, S, generator=generator(5)) < 0.6
    seen[:, :, 0] = False
    return seen


def padded(B: int, h: int, T: int, S: int, left: bool, expanded: bool) -> Tensor:
    """Bool: sequence b lacks b * S / (B - 1) keys on one side, the last one all."""
    place = torch.arange(S) if left else torch.arange(S).flip(0)
    seen = place[None] >= (torch.arange(B) * S // max(1, B - 1))[:, None]
    return seen[:, None, None].expand(B, h, T, S) if expanded else seen[:, None, None]


def added(B: int, h: int, T: int, S: int, gaps: bool = False) -> Tensor:
    """Numbers for each head, and with `gaps` minus infinity in places: the first query sees nothing."""
    numbers = torch.randn(h, T, S, generator=generator(6))
    if gaps:
        numbers[some(1, h, T, S)[0].logical_not().expand(h, T, S)] = NONE
    return numbers.expand(B, h, T, S)


def with_mask_of_heads(B: int, h: int, T: int, S: int) -> Tensor:
    return torch.rand(B, h, T, S, generator=generator(7)) < 0.7


def spread(**settings: Any) -> tuple[Any, ...]:
    """Every tensor with gaps in memory."""
    return tuple(strided(a) if isinstance(a, Tensor) else a for a in arguments(**settings))


def transposed() -> tuple[Any, ...]:
    """As a module gives them: queries from (B, T, h, D), latents as columns, factors turned over."""
    args = list(arguments(B=2, T=3, S=19))
    args[0] = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    for i in (1, 2, 4, 5):
        args[i] = args[i].mT.contiguous().mT
    return tuple(args)


def growing_scores() -> tuple[Any, ...]:
    """The largest score comes last, far above the others: what was summed before must shrink."""
    args = list(arguments(S=200, T=2, turned=False, biases=False))
    args[1] = args[1] * torch.linspace(0.2, 6, 200)[None, :, None]
    return tuple(args)


_EVERY_DTYPE: dict[str, dict[str, Any]] = {
    "everything": {"B": 2, "T": 5, "norm": True, "mask": some, "own_angles": True},
    "token": {"h": 8, "S": 50},
    "prompt": {"T": 40, "S": 70, "Rv": 90, "is_causal": True},
    "added_mask": {"B": 2, "T": 3, "mask": added},
}
_ROWS: dict[str, dict[str, Any]] = {
    "odd": {"h": 3, "kv": 1, "T": 5, "S": 9, "D": 7, "turned": False, "norm": True, "mask": added},
    "one_key": {"S": 1},
    "one_key_of_its_own": {"B": 4, "S": 1, "h": 3, "kv": 3, "turned": False, "biases": False},
    "plain_heads": {"h": 3, "kv": 3, "T": 4, "biases": False},
    "one_key_value_head": {"h": 6, "kv": 1, "T": 3, "S": 40},
    "groups_of_three": {"h": 6, "kv": 2, "T": 7, "S": 45, "norm": True},
    "no_rotation": {"turned": False, "T": 2},
    "causal_cache": {"T": 6, "S": 40, "is_causal": True},
    "causal_square": {"B": 2, "T": 37, "S": 37, "is_causal": True},
    "causal_more_queries_than_keys": {"T": 9, "S": 5, "is_causal": True},
    "causal_and_padded_left": {
        "B": 3,
        "T": 8,
        "S": 20,
        "is_causal": True,
        "mask": partial(padded, left=True, expanded=True),
    },
    "padded_right": {"B": 3, "T": 2, "S": 20, "mask": partial(padded, left=False, expanded=False)},
    "mask_of_heads": {"B": 2, "T": 3, "mask": with_mask_of_heads},
    "added_mask_with_gaps": {"T": 5, "S": 40, "mask": partial(added, gaps=True)},
    "mask_along_keys": {"T": 3, "mask": lambda B, h, T, S: torch.randn(S, generator=generator(8))},
    "mask_along_queries": {"T": 3, "mask": lambda B, h, T, S: torch.arange(T)[:, None] != 1},
    "ranks_of_one": {"Rk": 1, "Rv": 1, "T": 2},
    "rank_of_a_tile": {"Rk": 32, "Rv": 64},
    "long_ranks": {"Rk": 70, "Rv": 300, "T": 2},
    "rank_of_zero": {"Rk": 0, "Rv": 3},
    "value_rank_of_zero": {"Rk": 3, "Rv": 0},
    "no_keys": {"S": 0},
    "no_sequences": {"B": 0},
    "no_queries": {"T": 0},
    **{f"head_of_{d}": {"D": d, "T": 2, "Rk": 33, "Rv": 41} for d in (40, 64, 96, 128, 256)},
    "head_beyond_the_kernel": {"D": 260, "S": 9},
}
# Several slices of the kernel, and several tiles of plain PyTorch: of keys, and of queries.
SLICED = [
    OpCase(SPEC, "sliced_512", partial(arguments, S=512)),
    OpCase(SPEC, "sliced_700", partial(arguments, S=700, T=3, mask=some)),
    OpCase(SPEC, "sliced_values", partial(arguments, S=600, T=2, Rv=300, is_causal=True)),
]
_LARGE: dict[str, dict[str, Any]] = {
    "several_tiles_of_keys": {"S": 1100, "T": 3, "norm": True, "is_causal": True, "mask": some},
    "several_tiles": {"h": 8, "T": 300, "S": 600, "is_causal": True, "Rv": 60},
    "several_tiles_masked": {"h": 8, "T": 260, "S": 530, "mask": added, "Rv": 9, "dtype": torch.float16},
    "small_tiles_of_keys": {"kv": 32, "h": 32, "D": 256, "S": 300, "Rk": 5, "Rv": 7},
}

CASES = [
    *(
        OpCase(SPEC, f"{name}_{short(dtype)}", partial(arguments, **settings, dtype=dtype))
        for dtype in FLOATS
        for name, settings in _EVERY_DTYPE.items()
    ),
    *(OpCase(SPEC, name, partial(arguments, **settings)) for name, settings in _ROWS.items()),
    OpCase(SPEC, "strided", partial(spread, B=2, T=3, norm=True, mask=with_mask_of_heads, own_angles=True)),
    OpCase(SPEC, "strided_without_a_mask", partial(spread, B=2, T=20, Rv=120, is_causal=True)),
    OpCase(SPEC, "transposed", transposed),
    OpCase(SPEC, "growing_scores", growing_scores),
    *SLICED,
    *(OpCase(SPEC, name, partial(arguments, **settings), large=True) for name, settings in _LARGE.items()),
]
