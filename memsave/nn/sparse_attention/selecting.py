"""Which keys a query attends to: those whose product with it is largest by the codes of the keys.

B sequences, h query and kv key/value heads (g = h / kv), T queries, S keys, head size D; M subspaces, C codewords. One
choice serves the g query heads of a key/value head, and for blocks all queries of a block. Keys are compared by their
codes alone, queries as they are: their products with all codewords are looked up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.pq_select_blocks import LEVELS

REPRESENTATIVES = 8
"""Queries that keys are chosen by for a block of queries, where the order counts: the first one and those before it."""
ROWS_OF_REPRESENTATIVE = 8
"""Elsewhere: so many queries in a row are stood for by their mean."""
MIN_BLOCKS = 3
"""The first block, the one in which the queries stand, and one that is chosen."""
CHUNK_BYTES = 4 * 2**20
"""What the tables, lists and outputs of the queries that are computed together may take."""
_WEIGHT_BITS = 24  # of the largest weight of a key: what is 16.6 nats below the largest possible one counts nothing


class Choice(NamedTuple):
    """How many keys are chosen, and how.

    Attributes:
        keep: a fraction of the keys, if a float, or how many.
        granularity: "token" or "block".
        block_size: tokens of a block, both of queries and of keys.
    """

    keep: float | int
    granularity: str
    block_size: int

    @property
    def size(self) -> int:
        """Tokens that are chosen together."""
        return self.block_size if self.granularity == "block" else 1

    def num_keys(self, keys: int) -> int:
        """How many of `keys` keys a query attends to at most."""
        if self.granularity == "block":
            return min(keys, self.num_blocks(keys) * self.block_size)
        return max(1, min(self._wanted(keys), keys))

    def num_blocks(self, keys: int) -> int:
        """How many key blocks a query block attends to at most."""
        there = -(-keys // self.block_size)
        return max(1, min(there, max(MIN_BLOCKS, -(-self._wanted(keys) // self.block_size))))

    def _wanted(self, keys: int) -> int:
        return self.keep if isinstance(self.keep, int) else math.ceil(self.keep * keys)


class Visibility(NamedTuple):
    """Which keys a query sees.

    Attributes:
        mask: bool, True where a query sees a key, (B or 1, kv or 1, T or 1, S); None for no such mask.
        is_causal: query t sees key s only for s <= position + t.
        window: from 1 on: only for s > position + t - window.
        position: beside which key query 0 stands.
        local: whether queries stand beside keys at all, as in self-attention.
    """

    mask: Tensor | None
    is_causal: bool
    window: int
    position: int
    local: bool

    def of_rows(self, rows: slice) -> Visibility:
        """The same for some of the queries."""
        mask = self.mask if self.mask is None or self.mask.shape[2] == 1 else self.mask[:, :, rows]
        return self._replace(mask=mask, position=self.position + rows.start)


def chunk_rows(query: Tensor, key: Tensor, codebook: Tensor, choice: Choice) -> int:
    """For how many queries keys are chosen, and attended to, together: whole blocks."""
    batch, heads, _, features = query.shape
    groups, subspaces = key.shape[1], codebook.shape[1]
    if choice.granularity == "token":
        # A list, a table, the sum of the queries of a group, and outputs.
        row_bytes = groups * (4 * choice.num_keys(key.shape[2]) + 16 * subspaces + 4 * features)
        row_bytes += heads * features * query.dtype.itemsize
    else:
        representatives = max(REPRESENTATIVES, choice.block_size // ROWS_OF_REPRESENTATIVE)
        tables = representatives * (16 * subspaces + 4 * LEVELS + 4 * features) // choice.block_size
        row_bytes = heads * (features * query.dtype.itemsize + tables)
    rows = max(1, CHUNK_BYTES // max(1, batch * row_bytes))
    return max(1, rows // choice.size) * choice.size


def choose(
    query: Tensor, rows: slice, codes: Tensor, codebook: Tensor, choice: Choice, see: Visibility, scale: float
) -> Tensor:
    """The lists (B, kv, N, K) int32 that `ops.selected_attention` takes, for some `rows` of query (B, h, T, D).

    Args:
        rows: for blocks, they begin with a whole number of blocks.
        codes: (B, kv, P, S) uint8, of the keys.
        codebook: (kv, M, C, d) float32.
        see: what all queries see.
    """
    here = see.of_rows(rows)
    if choice.granularity == "token":
        return _tokens(query[:, :, rows], codes, codebook, choice, here, scale)
    return _blocks(query, rows, codes, codebook, choice, here, scale)


def _tokens(query: Tensor, codes: Tensor, codebook: Tensor, choice: Choice, see: Visibility, scale: float) -> Tensor:
    groups, keys = codes.shape[1], codes.shape[3]
    grouped = query.unflatten(1, (groups, -1))  # (B, kv, g, R, D)
    # What all heads of a group would give a key together is the product with the sum of their queries.
    wanted = grouped.squeeze(2) if grouped.shape[2] == 1 else grouped.float().sum(2)
    table, _ = ops.pq_table(wanted if scale > 0 else -wanted, codebook)
    return ops.pq_select(table, codes, see.mask, see.is_causal, see.window, see.position, choice.num_keys(keys))


def _blocks(
    query: Tensor, rows: slice, codes: Tensor, codebook: Tensor, choice: Choice, see: Visibility, scale: float
) -> Tensor:
    groups, size = codes.shape[1], choice.block_size
    # A query must not depend on what comes after it, not even by the choice of keys that it shares with its block. A
    # mask for each query may hide what comes after, too, and queries that attend to others may come from a decoder.
    ordered = see.is_causal or not see.local or (see.mask is not None and see.mask.shape[2] > 1)
    if ordered:
        chosen_by = _first_queries(query, rows, size)
    else:
        chosen_by = _means(query, rows, size, _no_padding(see.mask, query, codes.shape[3]))
    chosen_by = chosen_by.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)  # (B, kv, N, g r, D)
    shape = chosen_by.shape[2:4]
    table, step = ops.pq_table(chosen_by.flatten(2, 3) * scale, codebook)
    levels = torch.arange(-255, 1, device=query.device, dtype=torch.float32)
    weights = (levels * step[..., None]).exp_().mul_(2.0**_WEIGHT_BITS).to(torch.int32)  # (B, kv, N g r, 256)
    return ops.pq_select_blocks(
        table.unflatten(2, shape),
        weights.unflatten(2, shape),
        codes,
        _counting(see.mask, size, see.local),
        see.is_causal,
        see.window,
        see.position,
        size,
        choice.num_blocks(codes.shape[3]),
        see.local,
    )


def _first_queries(query: Tensor, rows: slice, size: int) -> Tensor:
    """query (B, h, T, D) -> (B, h, N, r, D) float32: the first query of each block of `rows`, and those before it."""
    first = torch.arange(rows.start, rows.stop, size, device=query.device)
    places = first[:, None] - torch.arange(REPRESENTATIVES - 1, -1, -1, device=query.device)  # (N, r)
    return query[:, :, places.clamp_(min=0)].float()


def _means(query: Tensor, rows: slice, size: int, real: Tensor | None) -> Tensor:
    """query (B, h, T, D) -> (B, h, N, r, D) float32: means of some queries in a row of each block of `rows`.

    real: (B or 1, h or 1, T) bool, the queries that are no padding; None for all.
    """
    pooled = math.gcd(size, ROWS_OF_REPRESENTATIVE)
    query = query[:, :, rows].float()
    missing = -query.shape[2] % size
    counts = (
        torch.ones(1, 1, query.shape[2], 1, device=query.device) if real is None else real[:, :, rows, None].float()
    )
    if real is not None:
        query = query * counts
    query, counts = (F.pad(t, (0, 0, 0, missing)).unflatten(2, (-1, size // pooled, pooled)) for t in (query, counts))
    return query.sum(4) / counts.sum(4).clamp_(min=1)


def _no_padding(mask: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """Which queries of self-attention are no padding, (B or 1, h or 1, T), from the mask of the keys; None for all."""
    if mask is None or query.shape[2] != keys:
        return None
    of_keys = mask[:, :, 0]
    return of_keys if of_keys.shape[1] == 1 else of_keys.repeat_interleave(query.shape[1] // of_keys.shape[1], 1)


def _counting(mask: Tensor | None, size: int, local: bool) -> Tensor | None:
    """mask (B, kv, R, S) -> (B, kv, N, S): which keys count for a block.

    Those that its first query sees where keys have an order; those that any query sees where they have none.
    """
    if mask is None or mask.shape[2] == 1:
        return mask
    if local:
        return mask[:, :, ::size]
    return F.pad(mask, (0, 0, 0, -mask.shape[2] % size)).unflatten(2, (-1, size)).any(3)
