"""What the plain PyTorch implementations of `selected_attention` and its backward share: some query blocks of one head.

For one sequence and one key/value head with its g query heads: n query blocks of b queries, K key blocks of b keys for
each. Queries are (n, g b, D), gathered keys (n, K b, D), scores (n, g b, K b).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**20
"""What the scores that are computed together may take: they should stay in the cache."""
FAR = 2**62
"""Stands for the place of a key that is not there."""


class Visibility(NamedTuple):
    """Which keys a query sees; see `pq_select`. The mask is (R or 1, S) for one sequence and one head."""

    mask: Tensor | None
    is_causal: bool
    window: int
    position: int


class Head(NamedTuple):
    """One key/value head: query (g, R, D), key (S, D), value (S, E), indices (N, K)."""

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    visibility: Visibility
    block_size: int


def statistics_dtype(x: Tensor) -> torch.dtype:
    """In which dtype everything is computed, and log-sum-exp returned: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def heads(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, visibility: Visibility, block_size: int
) -> Iterator[tuple[int, int, slice, Head]]:
    """(sequence, key/value head, its query heads, the tensors of both)."""
    groups = key.shape[1]
    repeats = query.shape[1] // groups
    for b in range(key.shape[0]):
        for g in range(groups):
            of_queries = slice(g * repeats, (g + 1) * repeats)
            mask = visibility.mask
            if mask is not None:
                mask = mask[b if mask.shape[0] > 1 else 0, g if mask.shape[1] > 1 else 0]
            here = visibility._replace(mask=mask)
            yield b, g, of_queries, Head(query[b, of_queries], key[b, g], value[b, g], indices[b, g], here, block_size)


def chunks(head: Head) -> Iterator[slice]:
    """Parts of the query blocks whose scores take about `CHUNK_BYTES`."""
    count, kept = head.indices.shape
    block_bytes = head.query.shape[0] * head.block_size**2 * kept * statistics_dtype(head.query).itemsize
    step = max(1, CHUNK_BYTES // max(1, block_bytes))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def row_slice(head: Head, part: slice) -> slice:
    """The queries of some query blocks."""
    return slice(part.start * head.block_size, min(head.query.shape[1], part.stop * head.block_size))


def by_query_block(x: Tensor, part: slice, block_size: int) -> Tensor:
    """x (g, rows, D), the queries of `part`, -> (n, g b, D) in the dtype of the mathematics; zeros fill the last block."""
    blocks = part.stop - part.start
    x = x.to(statistics_dtype(x))
    x = F.pad(x, (0, 0, 0, blocks * block_size - x.shape[1]))
    return x.unflatten(1, (blocks, block_size)).transpose(0, 1).flatten(1, 2)


def to_rows(x: Tensor, groups: int, rows: int) -> Tensor:
    """(n, g b, D) -> (g, rows, D): undoes `by_query_block`, up to the dtype."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 2)[:, :rows]


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """(S, D) -> (L, b D): one row for each key block; a view where S is a multiple of b and x contiguous."""
    blocks = -(-x.shape[0] // block_size)
    return F.pad(x, (0, 0, 0, blocks * block_size - x.shape[0])).reshape(blocks, block_size * x.shape[1])


def gathered(blocks: Tensor, indices: Tensor, block_size: int) -> Tensor:
    """blocks (L, b D), indices (n, K) from 0 on -> (n, K b, D) in the dtype of the mathematics."""
    kept = blocks.index_select(0, indices.flatten())  # (n K, b D)
    return kept.to(statistics_dtype(kept)).view(indices.shape[0], indices.shape[1] * block_size, blocks.shape[1] // block_size)


def scores(head: Head, part: slice, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """scale * q k^T, -inf where a query does not see a key: (n, g b, K b)."""
    result = torch.bmm(query, key.mT).mul_(scale)
    by_block = result.view(len(query), head.query.shape[0], head.block_size, head.indices.shape[1], head.block_size)
    by_block.masked_fill_(_hidden(head, part)[:, None], float("-inf"))
    return result


def _hidden(head: Head, part: slice) -> Tensor:
    """(n, b or 1, K, b): which keys a query does not see."""
    see, size, count = head.visibility, head.block_size, head.key.shape[0]
    inside = torch.arange(size, device=head.indices.device)
    keys = (head.indices[part, :, None] * size + inside)[:, None]  # (n, 1, K, b)
    missing = (keys < 0).logical_or_(keys >= count)
    keys.masked_fill_(missing, FAR)
    first = torch.arange(part.start, part.stop, device=inside.device) * size
    rows = (first[:, None] + inside)[:, :, None, None]  # (n, b, 1, 1)
    hidden = keys > rows + see.position if see.is_causal else missing
    if see.window:
        early = keys <= rows + (see.position - see.window)
        hidden = early.logical_or_(hidden)
    if see.mask is not None:
        of_rows = rows.clamp_(max=see.mask.shape[0] - 1) if see.mask.shape[0] > 1 else rows[:1, :1] * 0
        hidden = hidden | see.mask.expand(-1, count)[of_rows, keys.clamp_(max=count - 1)].logical_not_()
    return hidden
