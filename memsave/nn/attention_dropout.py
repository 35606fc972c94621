"""Attention with dropout where torch has no fused kernel for it: on the CPU.

q is (B, h, T, D), k (B, kv, S, D), v (B, kv, S, E), h = n kv; a mask, additive or boolean, is (B, h, T, S) up to
broadcasting. Kept for backward: q, k, v, the mask, and one bit per probability (rows of S bits, in whole bytes).
Scores and probabilities are made again in backward, for a few heads at a time.

The random numbers are those that torch draws: `bernoulli_` gives the same ones for every dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .eager import once_differentiable
from .matrix import as_matrix

_CHUNK_BYTES = 2**20
"""What the scores of the heads that are computed together may take: they should stay in the cache."""


class _Settings(NamedTuple):
    dropout: float
    scale: float
    is_causal: bool


def attend_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    is_causal: bool,
) -> Tensor:
    """What `F.scaled_dot_product_attention` computes without a fused kernel: (B, h, T, E).

    Args:
        query, key, value: of one dtype; half precision is computed in fp32, as torch does.
        mask: boolean (True takes part) or additive in the dtype of `query`, or None.
        dropout: share of the probabilities that are dropped, 0 <= dropout < 1.
    """
    settings = _Settings(dropout, query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
    output: Tensor = _Attention.apply(query, key, value, mask, settings)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, settings: _Settings
    ) -> Tensor:
        shape = (*query.shape[:3], key.shape[2])  # (B, h, T, S)
        keep = None
        if settings.dropout:
            keep = torch.empty(shape, dtype=torch.bool, device=query.device).bernoulli_(1 - settings.dropout)
        batch, heads, length = query.shape[:3]
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(
            1, 2
        )  # as torch's fused kernel has it
        for part in _parts(query, key):
            q, k, v = _in_math_dtype(part.of_queries(query), part.of_keys(key), part.of_keys(value))
            p, factor = _probabilities(q, k, part.of_mask(mask), settings)
            if keep is not None:
                p.mul_(part.of_queries(keep).view(torch.uint8))
            torch.mul(_over_keys(p, v), factor, out=part.of_queries(output))
        ctx.settings = settings
        bits = None if keep is None else ops.pack_bits(as_matrix(keep)).view(*shape[:3], -1)
        ctx.save_for_backward(query, key, value, mask, bits)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, bits = ctx.saved_tensors
        settings: _Settings = ctx.settings
        dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
        dmask = torch.zeros_like(mask) if ctx.needs_input_grad[3] else None
        for part in _parts(query, key):
            q, k, v = _in_math_dtype(part.of_queries(query), part.of_keys(key), part.of_keys(value))
            p, factor = _probabilities(q, k, part.of_mask(mask), settings)
            dy = torch.mul(part.of_queries(doutput), factor, out=q.new_empty(*q.shape[:3], v.shape[-1]))
            kept = None if bits is None else part.of_queries(bits)
            part.of_keys(dvalue).copy_(_to_keys(p if kept is None else _dropped(p, kept), dy, v.shape[1]))
            dp = _over_features(dy, v)
            if kept is not None:
                dp = _dropped(dp, kept)
            dscores = torch._softmax_backward_data(dp, p, -1, p.dtype)
            del p, dp
            if dmask is not None:
                target = part.of_mask(dmask)
                target += dscores.sum_to_size(target.shape)
            torch.mul(_over_keys(dscores, k), settings.scale, out=part.of_queries(dquery))
            torch.mul(_to_keys(dscores, q, k.shape[1]), settings.scale, out=part.of_keys(dkey))
        return dquery, dkey, dvalue, dmask, None


class _Part(NamedTuple):
    """Some batch elements, and some heads of k and v with their heads of q."""

    batch: slice
    heads: slice
    query_heads: slice

    def of_queries(self, t: Tensor) -> Tensor:
        return t[self.batch, self.query_heads]

    def of_keys(self, t: Tensor) -> Tensor:
        return t[self.batch, self.heads]

    def of_mask(self, mask: Any) -> Any:
        """The mask's part; a dimension of size 1 stands for all."""
        if mask is None:
            return None
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
        wanted = (self.batch, self.query_heads)
        return mask[tuple(s if size > 1 else slice(None) for s, size in zip(wanted, mask.shape, strict=False))]


def _parts(query: Tensor, key: Tensor) -> Iterator[_Part]:
    """All of the work, in parts whose scores take about `_CHUNK_BYTES`."""
    batch, groups = key.shape[:2]
    repeats = query.shape[1] // groups
    scores_bytes = repeats * query.shape[2] * key.shape[2] * max(query.dtype.itemsize, 4)
    count = max(_CHUNK_BYTES // max(scores_bytes, 1), 1)
    batches, heads = max(count // groups, 1), min(count, groups)
    for b in range(0, batch, batches):
        for g in range(0, groups, heads):
            yield _Part(slice(b, b + batches), slice(g, g + heads), slice(g * repeats, (g + heads) * repeats))


def _in_math_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)).contiguous() for t in tensors)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, settings: _Settings) -> tuple[Tensor, Tensor | float]:
    """Before dropout, (b, h, T, S); and by what the rows of the output are to be multiplied, (b, h or 1, T, 1).

    That is 1 / (1 - dropout), or 0 for a row that may see no key: torch has zeros there.
    """
    factor = 1 / (1 - settings.dropout)
    groups, keys = k.shape[1:3]
    scores = q.new_empty(*q.shape[:3], keys)
    sees = None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, float("-inf"))
        # From the mask, which all heads share as a rule: a look at the scores takes longer than their softmax.
        sees = mask.amax(-1, keepdim=True) > float("-inf")
        scores.copy_(mask.masked_fill(~sees, 0.0))
    flat = scores.view(-1, scores.numel() // max(q.shape[0] * groups * keys, 1), keys)  # (b g, n T, S)
    products = (_grouped(q, groups).flatten(0, 1), k.flatten(0, 1).mT)
    flat.baddbmm_(*products, beta=0 if mask is None else 1, alpha=settings.scale)
    if settings.is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril_()
        scores.masked_fill_(~visible, float("-inf"))
    return torch.softmax(scores, -1), factor if sees is None else sees.to(scores.dtype) * factor


def _grouped(t: Tensor, groups: int) -> Tensor:
    """(b, n g, T, D) as (b, g, n T, D): the heads of q that read one head of k."""
    return t.reshape(t.shape[0], groups, -1, t.shape[-1])


def _over_features(a: Tensor, k: Tensor) -> Tensor:
    """a (b, n g, T, D) times k (b, g, S, D), transposed: (b, n g, T, S)."""
    return (_grouped(a, k.shape[1]) @ k.mT).view(*a.shape[:3], k.shape[2])


def _over_keys(p: Tensor, v: Tensor) -> Tensor:
    """p (b, n g, T, S) times v (b, g, S, D): (b, n g, T, D)."""
    return (_grouped(p, v.shape[1]) @ v).view(*p.shape[:3], v.shape[-1])


def _to_keys(p: Tensor, a: Tensor, groups: int) -> Tensor:
    """p (b, n g, T, S), transposed, times a (b, n g, T, D), summed over the heads of a group: (b, g, S, D)."""
    return _grouped(p, groups).mT @ _grouped(a, groups)


def _dropped(p: Tensor, bits: Tensor) -> Tensor:
    """p (b, h, T, S) where the bit is set, else 0; bits (b, h, T, ceil(S / 8))."""
    return ops.masked_scale(as_matrix(p), as_matrix(bits), 1.0).view(p.shape)
