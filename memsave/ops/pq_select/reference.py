"""Plain PyTorch implementation of `pq_select`: estimates of some rows at a time, and the largest of each row.

B sequences, H heads, R rows, S keys, M subspaces, K keys to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 4 * 2**20
"""What the estimates of the rows that are computed together may take, as int64."""


def pq_select(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    batch, heads, rows = table.shape[:3]
    keys = codes.shape[3]
    out = table.new_full((batch, heads, rows, keep), -1, dtype=torch.int32)
    places = torch.arange(keys, device=table.device)
    step = chunk_rows(table, codes)
    for start in range(0, rows, step):
        part = slice(start, min(rows, start + step))
        ranks = estimates(table[:, :, part], codes).mul_(keys).add_(places)  # of equal estimates, the later key's
        seen = visible(places, part, mask, is_causal, window, position)
        if seen is not None:
            ranks.masked_fill_(~seen, -1)
        best = ranks.topk(min(keep, keys), -1).values  # (B, H, r, K)
        found = torch.where(best < 0, keys, best % max(keys, 1)).sort(-1).values
        out[:, :, part, : found.shape[3]] = found.masked_fill_(found == keys, -1)
    return out


def estimates(table: Tensor, codes: Tensor) -> Tensor:
    """(B, H, R, M, 16), (B, H, P, S) -> (B, H, R, S) int64."""
    total = table.new_zeros((*table.shape[:3], codes.shape[3]), dtype=torch.int64)
    for m in range(table.shape[3]):
        code = (codes[:, :, m // 2] >> 4 * (m % 2)) & 15  # (B, H, S)
        places = code[:, :, None].expand(-1, -1, table.shape[2], -1).long()
        total += table[:, :, :, m].gather(-1, places)
    return total


def visible(
    places: Tensor, rows: slice, mask: Tensor | None, is_causal: bool, window: int, position: int
) -> Tensor | None:
    """Which keys at `places` (S,) the rows see, broadcast to (B, H, rows, S); None for all."""
    own = torch.arange(rows.start, rows.stop, device=places.device)[:, None] + position  # (r, 1)
    seen = None
    if mask is not None:
        seen = mask if mask.shape[2] == 1 else mask[:, :, rows]
    if is_causal:
        seen = places <= own if seen is None else seen & (places <= own)
    if window:
        seen = places > own - window if seen is None else seen & (places > own - window)
    return seen


def chunk_rows(table: Tensor, codes: Tensor) -> int:
    """How many rows are computed together."""
    return max(1, CHUNK_BYTES // max(1, 8 * table.shape[0] * table.shape[1] * codes.shape[3]))


def workspace_bytes(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> int:
    """Estimates of the rows of a chunk, and of one subspace the codes as indices."""
    rows, keys = min(chunk_rows(table, codes), table.shape[2]), codes.shape[3]
    return 8 * keys + table.shape[0] * table.shape[1] * rows * (26 * keys + 40 * min(keep, keys))
