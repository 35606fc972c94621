"""Plain PyTorch implementation of `pq_select`: estimates of some rows at a time, and the largest of each row.

B sequences, H heads, R rows, S keys, M subspaces, K keys to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_CODEWORDS = 16
CHUNK_BYTES = 4 * 2**20
"""What the estimates of the rows that are computed together may take, as int64."""


def pq_select(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    batch, heads, rows = table.shape[:3]
    out = table.new_full((batch, heads, rows, keep), -1, dtype=torch.int32)
    step = chunk_rows(table, codes)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        shown = None if mask is None else of_rows(mask, part)
        place = out[:, :, part, : codes.shape[3]]
        place.copy_(_select(table[:, :, part], codes, shown, is_causal, window, position + start, keep))
    return out


def _select(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    """(B, H, r, min(K, S)) int64: the same for some rows."""
    keys = codes.shape[3]
    places = torch.arange(keys, device=table.device)
    own = torch.arange(position, position + table.shape[2], device=table.device)[:, None]
    ranks = estimates(table, codes).mul_(keys).add_(places)  # of equal estimates, the later key's
    if is_causal:
        ranks.masked_fill_(places > own, -1)
    if window:
        ranks.masked_fill_(places <= own - window, -1)
    if mask is not None:
        ranks.masked_fill_(mask.logical_not(), -1)
    return largest(ranks, keep)


def largest(ranks: Tensor, keep: int) -> Tensor:
    """(B, H, r, S) -> (B, H, r, min(K, S)): s of the largest ranks, which are S * number + s, ascending.

    -1 where a rank is negative.
    """
    count = ranks.shape[3]
    best = ranks.topk(min(keep, count), -1, sorted=False).values
    hidden = best < 0
    found = best.remainder_(max(count, 1)).masked_fill_(hidden, count).sort(-1).values
    return found.masked_fill_(found == count, -1)


def largest_bytes(rows: int, count: int, keep: int) -> int:
    """What `largest` allocates, its result included: the best, which of them are hidden, and these in order."""
    kept = min(keep, count)
    return rows * kept * (8 + 1 + 16) + 8 * kept


def estimates(table: Tensor, codes: Tensor) -> Tensor:
    """(B, H, R, M, 16), (B, H, P, S) -> (B, H, R, S) int64."""
    total = table.new_zeros((*table.shape[:3], codes.shape[3]), dtype=torch.int64)
    for m in range(table.shape[3]):
        code = codes[:, :, m // 2].bitwise_right_shift(4 * (m % 2)).bitwise_and_(15).long()  # (B, H, S)
        total += table[:, :, :, m].long().gather(-1, code[:, :, None].expand_as(total))
    return total


def of_rows(mask: Tensor, rows: slice) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def chunk_rows(table: Tensor, codes: Tensor) -> int:
    """How many rows are computed together, of each head."""
    return max(1, CHUNK_BYTES // max(1, 8 * table.shape[0] * table.shape[1] * codes.shape[3]))


def workspace_bytes(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> int:
    """Estimates of the rows of a chunk, and those of one subspace, or the best of them."""
    (batch, heads), keys = table.shape[:2], codes.shape[3]
    rows = min(chunk_rows(table, codes), table.shape[2])
    if not rows:
        return 0
    all_rows = batch * heads * rows
    beside = max(largest_bytes(all_rows, keys, keep), estimating_bytes(table, codes, rows))
    return 8 * (keys + rows) + 8 * all_rows * keys + beside


def estimating_bytes(table: Tensor, codes: Tensor, rows: int) -> int:
    """What `estimates` of so many rows allocates beside its result: one subspace's table, codes and entries."""
    heads, keys = table.shape[0] * table.shape[1], codes.shape[3]
    of_next = 17 * keys if table.shape[-2] > 1 else 0  # the codes of two, as long as both are there
    return heads * max(8 * keys + 8 * rows * (MAX_CODEWORDS + keys), of_next)
