"""How the plain PyTorch implementation cuts one call into tiles, and the memory that it takes once and uses again.

B sequences, h query and kv key/value heads, T queries, S keys, head size D, ranks Rk and Rv; n keys and t queries are
in a tile, W = Rv or D numbers are accumulated for each query.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .sizes import Sizes, sizes

KEY_BYTES, MIN_KEYS, MAX_KEYS = 4 * 2**20, 128, 512  # of the rebuilt keys of a tile; more than 512 are no faster
SCORE_BYTES = 4 * 2**20


class Plan(NamedTuple):
    """The sizes, keys n and queries t of a tile, whether values are accumulated in rank space, and the dtype."""

    size: Sizes
    keys: int
    queries: int
    in_rank_space: bool
    wide: torch.dtype

    @property
    def width(self) -> int:
        return self.size.Rv if self.in_rank_space else self.size.D


def plan(query: Tensor, key_latent: Tensor, key_factor: Tensor, value_latent: Tensor) -> Plan:
    size = sizes(query, key_latent, key_factor, value_latent)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    fitting = KEY_BYTES // (size.kv * size.D * wide.itemsize)
    keys = min(max(MIN_KEYS, min(MAX_KEYS, fitting)), size.S)
    queries = min(max(1, SCORE_BYTES // max(1, size.h * keys * wide.itemsize)), size.T)
    return Plan(size, keys, queries, accumulates_in_rank_space(size), wide)


def accumulates_in_rank_space(size: Sizes) -> bool:
    """Whether that takes fewer multiplications than rebuilding the values.

    With M = T * h / kv rows for each key/value head: in rank space M * Rv for each key, and M * Rv * D at the end;
    otherwise D * Rv to rebuild a value and M * D to add it. One token (M = h / kv) is decoded in rank space, a long
    prompt is not.
    """
    rows = size.T * size.group
    rebuilding = size.S * (size.D * size.Rv + rows * size.D)
    return size.S * rows * size.Rv + rows * size.Rv * size.D <= rebuilding


def usable(matrix: Tensor, wide: torch.dtype) -> bool:
    """Whether matrix products take (..., rows, columns) as it is, without a copy."""
    return matrix.dtype == wide and matrix.stride(-1) == 1 and matrix.stride(-2) >= max(1, matrix.shape[-1])


class Buffers:
    """Memory that is taken once for each name and used for every tile; the last tile, which is smaller, takes a part.

    Args:
        elements: of each buffer, of dtype `wide`; those named in BOOLEANS are bool.
    """

    BOOLEANS = ("hidden", "unseen")

    def __init__(self, elements: dict[str, int], wide: torch.dtype, like: Tensor) -> None:
        self._flat = {
            name: torch.empty(count, dtype=torch.bool if name in self.BOOLEANS else wide, device=like.device)
            for name, count in elements.items()
        }

    def take(self, name: str, *shape: int, begin: int = 0) -> Tensor:
        return self._flat[name][begin : begin + prod(shape)].view(shape)

    @classmethod
    def count_bytes(cls, elements: dict[str, int], wide: torch.dtype) -> int:
        return sum(count * (1 if name in cls.BOOLEANS else wide.itemsize) for name, count in elements.items())


def collapsed(mask: Tensor, size: Sizes) -> Tensor:
    """The mask (B, h, T, S) with size 1 in each dimension along which it repeats."""
    mask = mask.expand(size.B, size.h, size.T, size.S)
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def buffer_elements(
    plan: Plan,
    key_latent: Tensor,
    key_factor: Tensor,
    key_bias: Tensor | None,
    value_latent: Tensor,
    value_factor: Tensor,
    value_bias: Tensor | None,
    cos: Tensor | None,
    norm_weight: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
) -> dict[str, int]:
    """What each buffer holds; nothing of it grows with S, but what is kept of a query grows with T."""
    size, n, t, wide = plan.size, plan.keys, plan.queries, plan.wide
    h, kv, d = size.h, size.kv, size.D
    elements = {"queries": h * size.T * d, "sums": h * size.T * plan.width, "peaks": h * size.T, "totals": h * size.T}
    elements |= {"keys": kv * d * n, "scores": h * t * n, "shift": h * t, "decay": h * t}
    copied = {"key_latent": (key_latent, n * size.Rk), "value_latent": (value_latent, n * size.Rv)}
    copied |= {"key_factor": (key_factor, kv * d * size.Rk), "value_factor": (value_factor, kv * d * size.Rv)}
    elements |= {name: count for name, (tensor, count) in copied.items() if not usable(tensor, wide)}
    small = {"key_bias": key_bias, "value_bias": value_bias, "norm_weight": norm_weight}
    elements |= {name: tensor.numel() for name, tensor in small.items() if tensor is not None and tensor.dtype != wide}
    if cos is not None:
        elements |= {"cos": d * n, "sin": d * n}
    if cos is not None or norm_weight is not None:
        elements["others"] = kv * d * n
    if norm_weight is not None:
        elements["roots"] = kv * n
    if plan.in_rank_space:
        elements["rebuilt"] = h * t * d
    else:
        elements["values"] = n * kv * d
    if is_causal:
        elements["hidden"] = t * n
    if mask is not None and mask.dtype != wide:
        _, *repeats = collapsed(mask, size).shape
        elements["unseen" if mask.dtype == torch.bool else "added"] = prod(
            min(has, of) for has, of in zip(repeats, (h, t, n), strict=True)
        )
    return elements
