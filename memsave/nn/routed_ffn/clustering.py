"""Dividing hidden units into equal blocks of units that are active for the same tokens.

F units, G blocks, P tokens. A unit's pattern (P,) is how much of each token's hidden activity it makes; units are
clustered by the cosine between their patterns, with k-means whose clusters are kept equal in size. Everything is
deterministic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDS = 30


def clustered(patterns: Tensor, blocks: int) -> Tensor:
    """The order (F,) int64 in which each block's units follow on each other, for patterns (P, F) of at least 0."""
    units = F.normalize(patterns.to(torch.float32).t(), dim=1)  # (F, P); a unit that is never active is zero
    centers = _first_centers(units, blocks)
    assigned = None
    for _ in range(_ROUNDS):
        found = balanced(units @ centers.t(), len(units) // blocks)
        if assigned is not None and torch.equal(found, assigned):
            break
        assigned = found
        sums = units.new_zeros((blocks, units.shape[1])).index_add_(0, assigned, units)
        centers = F.normalize(sums, dim=1)
    assert assigned is not None
    return _in_order(assigned, blocks)


def _first_centers(units: Tensor, blocks: int) -> Tensor:
    """Units that are as unlike each other as possible, the first most like all others: (G, P)."""
    chosen = [int((units @ units.sum(0)).argmax())]
    nearest = units @ units[chosen[0]]
    for _ in range(blocks - 1):
        # Units that are never active are unlike everything, but no center.
        farthest = torch.where(units.any(dim=1), nearest, torch.inf)
        chosen.append(int(farthest.argmin()))
        nearest = torch.maximum(nearest, units @ units[chosen[-1]])
    return units[chosen]


def balanced(scores: Tensor, size: int) -> Tensor:
    """A block for each unit (F,), `size` units each, from its scores (F, G), higher being better.

    In each round units ask for their best block that is open; a block that is asked for too often takes those that
    would lose most elsewhere, and closes.
    """
    num_units, blocks = scores.shape
    assigned = torch.full((num_units,), -1, dtype=torch.int64, device=scores.device)
    room = [size] * blocks
    scores = scores.clone()
    while bool((waiting := (assigned < 0).nonzero()[:, 0]).numel()):
        best, wanted = scores[waiting].max(1)
        rest = scores[waiting].scatter(1, wanted[:, None], -torch.inf).amax(1)
        loss = torch.where(rest.isfinite(), best - rest, torch.inf)
        for block in range(blocks):
            mine = (wanted == block).nonzero()[:, 0]
            if room[block] and mine.numel():
                first = loss[mine].sort(descending=True, stable=True).indices[: room[block]]
                assigned[waiting[mine[first]]] = block
                room[block] -= len(first)
        for block in range(blocks):
            if not room[block]:
                scores[:, block] = -torch.inf
    return assigned


def _in_order(assigned: Tensor, blocks: int) -> Tensor:
    """Units sorted by block, blocks by their first unit, so that units that are in order already stay."""
    numbers = torch.arange(len(assigned), device=assigned.device)
    first = torch.full((blocks,), len(assigned), device=assigned.device).scatter_reduce(
        0, assigned, numbers, "amin", include_self=True
    )
    return first.argsort(stable=True).argsort()[assigned].argsort(stable=True)
