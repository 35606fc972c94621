"""The sizes of one call of `low_rank_attention`, by the letters that its files use."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Sizes(NamedTuple):
    """B sequences, h query and kv key/value heads, T queries, S keys, head size D, ranks Rk and Rv."""

    B: int
    h: int
    kv: int
    T: int
    S: int
    D: int
    Rk: int
    Rv: int

    @property
    def group(self) -> int:
        """Query heads that share a key/value head: those from g * group on share head g."""
        return self.h // self.kv


def sizes(query: Tensor, key_latent: Tensor, key_factor: Tensor, value_latent: Tensor) -> Sizes:
    """Of arguments that fit together."""
    b, h, t, d = query.shape
    return Sizes(b, h, key_factor.shape[0] // d, t, key_latent.shape[1], d, key_latent.shape[2], value_latent.shape[2])
