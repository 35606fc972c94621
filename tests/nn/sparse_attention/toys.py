"""Inputs of attention, choices, and attention to given lists of keys by dense matrices: what the tests compare with.

B sequences, h query and kv key/value heads, T queries, S keys, head sizes D and E; lists (B, kv, N, K) as in
`selecting.choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memsave import ops
from memsave.nn.sparse_attention.selecting import Choice, Visibility, choose

SIZE = 16
"""Tokens of a block."""


class Case(NamedTuple):
    """Shapes, and what the queries see.

    Attributes:
        mask: "none", "left", "right" (padding), "full" (any mask of T x S), or "heads" (one for each key/value head).
    """

    rows: int = 45
    keys: int = 45
    heads: int = 4
    groups: int = 2
    mask: str = "none"
    is_causal: bool = False
    window: int = 0
    features: int = 8
    values: int = 8
    batch: int = 2


def choice(granularity: str, keep: float | int | None = None) -> Choice:
    """Few enough keys that some are left out: 9 single ones, or 3 blocks."""
    least = 9 if granularity == "token" else 3 * SIZE
    return Choice(least if keep is None else keep, granularity, SIZE)


def inputs(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k, v with their heads second, as transformers makes them, and an upstream gradient with both signs."""
    g = torch.Generator().manual_seed(seed)
    b, rows, keys = case.batch, case.rows, case.keys
    shapes = [(b, rows, case.heads, case.features), (b, keys, case.groups, case.features)]
    shapes += [(b, keys, case.groups, case.values), (b, rows, case.heads, case.values)]
    made = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2).detach() for s in shapes]
    return [*(t.requires_grad_() for t in made[:3]), made[3]]


def codebook(case: Case, subspaces: int = 2, codewords: int = 16, seed: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(case.groups, subspaces, codewords, case.features // subspaces, generator=g)


def sight(case: Case) -> Visibility:
    """What the queries of a case see; those of self-attention stand at its end."""
    b, rows, keys = case.batch, case.rows, case.keys
    g = torch.Generator().manual_seed(7)
    mask = None
    if case.mask in ("left", "right"):
        mask = torch.ones(b, 1, 1, keys, dtype=torch.bool)
        third = keys // 3
        mask[1, ..., slice(0, third) if case.mask == "left" else slice(keys - third, keys)] = False
    elif case.mask in ("full", "heads"):
        mask = torch.rand(b, case.groups if case.mask == "heads" else 1, rows, keys, generator=g) < 0.6
        mask[0, :, rows // 2] = False  # a query that sees nothing
    position = max(0, keys - rows)
    return Visibility(mask, case.is_causal, case.window, position, local=case.is_causal or rows == keys)


def visible(case: Case, see: Visibility) -> Tensor:
    """Which keys each query sees, (B, kv, T, S)."""
    places, own = torch.arange(case.keys), torch.arange(case.rows)[:, None] + see.position
    seen = torch.ones(case.rows, case.keys, dtype=torch.bool)
    if see.is_causal:
        seen = seen & (places <= own)
    if see.window:
        seen = seen & (places > own - see.window)
    shape = (case.batch, case.groups, case.rows, case.keys)
    return (seen if see.mask is None else seen & see.mask).expand(shape)


def chosen(query: Tensor, key: Tensor, codewords: Tensor, how: Choice, see: Visibility, scale: float) -> Tensor:
    """Which keys are chosen for each query, (B, kv, T, S), seen or not; all queries at once."""
    rows = query.shape[2]
    codes = ops.pq_encode(key.detach(), codewords)
    lists = choose(query.detach(), slice(0, rows), codes, codewords, how, see, scale)
    return of_lists(lists, rows, key.shape[2], how.size)


def of_lists(lists: Tensor, rows: int, keys: int, size: int) -> Tensor:
    """(B, kv, N, K) -> (B, kv, T, S)."""
    units = -(-keys // size)
    found = torch.zeros(*lists.shape[:3], units + 1, dtype=torch.bool)
    found.scatter_(-1, lists.long() % (units + 1), True)  # -1 comes last
    found = found[..., :-1].repeat_interleave(size, -1)[..., :keys]
    return found.repeat_interleave(size, 2)[:, :, :rows]


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v over what `allowed` (B, kv, T, S) names; zeros for a query that may see nothing."""
    repeats = query.shape[1] // key.shape[1]
    key, value, allowed = (t.repeat_interleave(repeats, 1) for t in (key, value, allowed))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return torch.where(allowed.any(-1, keepdim=True), weights, 0.0) @ value


def gradients(y: Tensor, tensors: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, tensors, upstream.to(y.dtype)))
