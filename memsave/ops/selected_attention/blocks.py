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


class Dropping(NamedTuple):
    """Which weights are dropped: drawn for each chunk, the same ones in forward and backward from equal generators.

    Attributes:
        share: of the weights that is dropped, in (0, 1).
        generator: on the device of the tensors.
    """

    share: float
    generator: torch.Generator

    def factors(self, weights: Tensor) -> Tensor:
        """What `weights` are to be multiplied with: 0, or 1 / (1 - share)."""
        kept = 1 - self.share
        return torch.empty_like(weights).bernoulli_(kept, generator=self.generator).div_(kept)


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
    count = head.indices.shape[0]
    step = chunk_blocks(head.query.shape[0], head.indices, head.block_size, statistics_dtype(head.query))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def chunk_blocks(groups: int, indices: Tensor, block_size: int, dtype: torch.dtype) -> int:
    """How many query blocks are computed together."""
    return max(1, CHUNK_BYTES // max(1, groups * block_size**2 * indices.shape[-1] * dtype.itemsize))


def row_slice(head: Head, part: slice) -> slice:
    """The queries of some query blocks."""
    return slice(part.start * head.block_size, min(head.query.shape[1], part.stop * head.block_size))


def by_query_block(x: Tensor, blocks: int, block_size: int) -> Tensor:
    """x (g, rows, D) -> (n, g b, D) in the dtype of the mathematics; zeros fill the last block."""
    out = x.new_zeros((blocks, x.shape[0], block_size, x.shape[2]), dtype=statistics_dtype(x))
    _copy(x, out, to_blocks=True)
    return out.flatten(1, 2)


def write_rows(x: Tensor, out: Tensor, block_size: int) -> None:
    """x (n, g b, D) to out (g, rows, D): undoes `by_query_block`."""
    _copy(out, x.view(len(x), len(out), block_size, x.shape[2]), to_blocks=False)


def _copy(rows: Tensor, blocks: Tensor, to_blocks: bool) -> None:
    """From rows (g, rows, D) to blocks (n, g, b, D), or back: of whole blocks, then of the last one."""
    size = blocks.shape[2]
    whole, rest = divmod(rows.shape[1], size)
    pairs = [(rows[:, : whole * size].unflatten(1, (whole, size)).transpose(0, 1), blocks[:whole])]
    if rest:
        pairs.append((rows[:, whole * size :], blocks[whole, :, :rest]))
    for of_rows, of_blocks in pairs:
        if to_blocks:
            of_blocks.copy_(of_rows)
        else:
            of_rows.copy_(of_blocks)


def in_blocks(x: Tensor, block_size: int) -> Tensor:
    """(S, D) -> (L, b D): one row for each key block; a view where that can be."""
    blocks = -(-x.shape[0] // block_size)
    if x.shape[0] % block_size:
        x = F.pad(x, (0, 0, 0, blocks * block_size - x.shape[0]))
    return x.reshape(blocks, block_size * x.shape[1])


def in_blocks_bytes(x: Tensor, block_size: int) -> int:
    """What `in_blocks` allocates for one head of x (B, kv, S, D)."""
    _, _, keys, features = x.shape
    copied = keys % block_size or (block_size > 1 and features > 1 and x.stride(2) != features * x.stride(3))
    return -(-keys // block_size) * block_size * features * x.element_size() if copied else 0


def gathered(blocks: Tensor, indices: Tensor, block_size: int) -> Tensor:
    """blocks (L, b D), indices (n, K) from 0 on -> (n, K b, D) in the dtype of the mathematics."""
    kept = blocks.index_select(0, indices.flatten())  # (n K, b D)
    shape = indices.shape[0], indices.shape[1] * block_size, blocks.shape[1] // block_size
    return kept.to(statistics_dtype(kept)).view(shape)


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
    first = head.indices[part, :, None].long().mul_(size)
    keys = (first + inside)[:, None]  # (n, 1, K, b)
    hidden = (keys < 0).logical_or_(keys >= count)
    keys.masked_fill_(hidden, FAR)
    rows = torch.arange(part.start * size, part.stop * size, device=inside.device).view(-1, size, 1, 1)  # (n, b, 1, 1)
    own = rows + see.position
    if see.is_causal:
        hidden = keys > own
    if see.window:
        hidden = _either(hidden, keys <= own.sub_(see.window))
    if see.mask is not None:
        of_rows = rows.clamp_(max=see.mask.shape[0] - 1) if see.mask.shape[0] > 1 else rows[:1, :1].zero_()
        shown = see.mask.expand(-1, count)[of_rows, keys.clamp_(max=count - 1)]
        hidden = _either(hidden, shown.logical_not_())
    return hidden


def _either(a: Tensor, b: Tensor) -> Tensor:
    """a | b, in the memory of the larger one."""
    return a.logical_or_(b) if a.numel() >= b.numel() else b.logical_or_(a)


class ChunkBytes(NamedTuple):
    """What a chunk of query blocks needs in the dtype of the mathematics.

    Attributes:
        number: of one number for each query.
        query, output: rows of D and of E.
        key, value: gathered rows of D and of E.
        of_key, of_value: these while they are gathered.
        scores: one for each pair.
        hidden: which pairs do not count, beside the scores.
        kept: the numbers of the key blocks.
    """

    number: int
    query: int
    output: int
    key: int
    value: int
    of_key: int
    of_value: int
    scores: int
    hidden: int
    kept: int


def chunk_bytes(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, visibility: Visibility, block_size: int
) -> ChunkBytes:
    """Of the first chunk, which is the largest."""
    groups, dtype, (count, kept) = query.shape[1] // key.shape[1], statistics_dtype(query), indices.shape[2:]
    n, wide = min(count, chunk_blocks(groups, indices, block_size, dtype)), dtype.itemsize
    rows, keys = n * groups * block_size, n * kept * block_size
    narrow = 0 if query.dtype == dtype else query.element_size()
    mask = visibility.mask
    full = visibility.is_causal + (visibility.window > 0) + (mask is not None and mask.shape[2] > 1)
    pairs = min(2, full) * keys * block_size + (keys if mask is not None and mask.shape[2] == 1 else 0)
    hidden = 8 * block_size + 8 * n * kept + (8 + 1) * keys + max(keys, 2 * 8 * n * block_size + pairs)
    size, of_value = query.shape[3], value.shape[3]
    return ChunkBytes(
        *(wide * rows, wide * rows * size, wide * rows * of_value),
        *(wide * keys * size, wide * keys * of_value),
        *((wide + narrow) * keys * size, (wide + narrow) * keys * of_value),
        *(wide * rows * kept * block_size, hidden, 4 * n * kept),
    )
