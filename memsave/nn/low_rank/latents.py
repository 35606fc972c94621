"""Attention to keys and values of which only the latents are kept, as a cache in rank space holds them.

B sequences, T queries, S keys, h query heads and kv key/value heads of size D; latents (B, S, R) of keys and of values,
the same tensor for a fused projection; with factors per head, (B, S, kv * r).

Without positions in the keys, queries go to rank space: scores are (q_i V_i) P_j^T for the factor V_i (D, R) of the
head, and keys are never rebuilt. Rotated keys are rebuilt some at a time (`ops.low_rank_attention`).
Source: FlashSVD, arXiv 2508.01506, whose decoding keeps full keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import ops
from .layout import HeadLayout
from .linear import LowRankLinear


class Side(NamedTuple):
    """The factors of the keys or of the values: (kv, D, R) and the bias (kv, D) or None; per head, R = r."""

    factor: Tensor
    bias: Tensor | None
    per_head: bool


@dataclass
class Latents:
    """What stands for the keys and values of all tokens so far.

    Attributes:
        key, value: latents.
        rotation: cos and sin, (B or 1, S, D), by which keys are rotated; None without.
    """

    root: nn.Module
    layout: HeadLayout
    key: Tensor
    value: Tensor
    rotation: tuple[Tensor, Tensor] | None

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, bias: Tensor | None = None) -> Tensor:
        """Attention of query (B, h, T, D), as it comes from the module: (B, T, h, D).

        Args:
            mask: (B, 1 or h, T, S), bool or added to the scores; None for the last T of S tokens in order.
            bias: (B or 1, h, T, S), added to the scores besides.
        """
        if bias is not None:
            mask = bias if mask is None else _added(mask, bias)
        if self.rotation is not None:
            return self._rotated(query, mask, scale)
        return self._absorbed(query, mask, scale)

    def _rotated(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        key, value = side(self.root, self.layout, "key"), side(self.root, self.layout, "value")
        assert self.rotation is not None
        cos, sin = self.rotation
        norm, eps = key_norm(self.root, self.layout)
        return ops.low_rank_attention(
            query,
            self.key,
            key.factor.flatten(0, 1),
            None if key.bias is None else key.bias.flatten(),
            self.value,
            value.factor.flatten(0, 1),
            None if value.bias is None else value.bias.flatten(),
            scale=scale,
            cos=cos,
            sin=sin,
            norm_weight=norm,
            norm_eps=eps,
            mask=mask,
            is_causal=mask is None,
        )

    def _absorbed(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        key, value = side(self.root, self.layout, "key"), side(self.root, self.layout, "value")
        batch, heads, length, _ = query.shape
        per_kv = self.layout.per_kv
        grouped = query.unflatten(1, (-1, per_kv))  # (B, kv, h/kv, T, D)
        latent_query = torch.einsum("bgitd,gdr->bgitr", grouped, key.factor)
        if mask is None and length > 1:
            mask = causal_mask(length, self.key.shape[1], query.device)
        if mask is not None:
            mask = mask.expand(batch, heads, length, self.key.shape[1])
        if key.per_head:
            latent_query = latent_query.flatten(2, 3)  # (B, kv, h/kv * T, r)
            keys, values = (_by_head(t, s) for t, s in ((self.key, key), (self.value, value)))
            mask = None if mask is None else mask.reshape(batch, -1, per_kv * length, mask.shape[-1])
        else:  # all heads read the same latents: they are queries of one head
            latent_query = latent_query.flatten(1, 3).unsqueeze(1)  # (B, 1, h * T, R)
            keys, values = self.key.unsqueeze(1), self.value.unsqueeze(1)
            mask = None if mask is None else mask.reshape(batch, 1, heads * length, -1)
        # The bias of the keys adds the same to all scores of a query, and drops out.
        seen = F.scaled_dot_product_attention(latent_query, keys, values, mask, scale=scale)
        seen = seen.reshape(batch, -1, per_kv, length, seen.shape[-1])  # (B, kv, h/kv, T, R)
        y = torch.einsum("bgitr,gdr->btgid", seen, value.factor)
        if value.bias is not None:
            bias = value.bias[:, None]  # (kv, 1, D)
            y += bias if mask is None else bias * _sees(mask, batch, y)
        return y.flatten(2, 3)


def side(root: nn.Module, layout: HeadLayout, role: str) -> Side:
    """The factors of the keys ("key") or of the values ("value")."""
    linear: Any = root.get_submodule(getattr(layout, role))
    blocks = layout.blocks(slice(0, layout.num_kv_heads))[getattr(layout, role)][role]
    features = layout.features(blocks)
    bias = None if linear.bias is None else linear.bias[features].view(-1, layout.head_size)
    if linear.heads is not None:
        return Side(linear.second[blocks], bias, True)
    return Side(linear.second[features].view(-1, layout.head_size, linear.rank), bias, False)


def latent_of(root: nn.Module, layout: HeadLayout, role: str, made: Tensor) -> Tensor:
    """The part that is kept of what the projection to keys or values makes, (B, T, latent)."""
    linear: Any = root.get_submodule(getattr(layout, role))
    if linear.heads is None or not layout.fused:
        return made
    blocks = layout.blocks(slice(0, layout.num_kv_heads))[layout.query][role]
    return made[..., blocks.start * linear.rank : blocks.stop * linear.rank]


def latent_widths(root: nn.Module, layout: HeadLayout) -> tuple[int, int] | None:
    """The widths of the latents of keys and values, 0 for values that share those of keys; None if there are none."""
    key, value = (root.get_submodule(name) for name in (layout.key, layout.value))
    if not (isinstance(key, LowRankLinear) and isinstance(value, LowRankLinear)):
        return None
    if key.heads is not None and layout.latent == "rotated":
        return None  # the kernel that rotates takes latents that all heads share
    if layout.fused:
        per_side = layout.num_kv_heads * key.rank
        return (key.rank, 0) if key.heads is None else (per_side, per_side)
    return key.latent_features, value.latent_features


def key_norm(root: nn.Module, layout: HeadLayout) -> tuple[Tensor | None, float]:
    """The weight by which keys are normed before they are rotated, as it is multiplied with, and epsilon."""
    if layout.key_norm is None:
        return None, 0.0
    name, plus_one = layout.key_norm
    norm: Any = root.get_submodule(name)
    eps = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None) or torch.finfo(norm.weight.dtype).eps
    return norm.weight + 1 if plus_one else norm.weight, float(eps)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """(T, S), true where the query, one of the last T of S tokens, may see the key."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def _added(mask: Tensor, bias: Tensor) -> Tensor:
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else mask + bias


def _by_head(latent: Tensor, of: Side) -> Tensor:
    return latent.unflatten(-1, (of.factor.shape[0], -1)).transpose(1, 2)  # (B, kv, S, r)


def _sees(mask: Tensor, batch: int, y: Tensor) -> Tensor:
    """1 for the queries that see a key, else 0: (B, T, kv, h/kv, 1) as y (B, T, kv, h/kv, D)."""
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    _, length, kv, per_kv, _ = y.shape
    return visible.any(-1).view(batch, kv, per_kv, length).permute(0, 3, 1, 2).unsqueeze(-1).to(y.dtype)
