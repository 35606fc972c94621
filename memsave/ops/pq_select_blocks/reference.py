"""Plain PyTorch implementation of `pq_select_blocks`: the shares of some query blocks at a time, and the largest.

B sequences, H heads, N query blocks, r representatives, S keys in L blocks, K key blocks to keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 4 * 2**20
"""What the estimates of the query blocks that are computed together may take, as int64."""
SHARE_BITS = 16
ALWAYS = 2**62
"""Stands for the share of a block that is always kept."""


def pq_select_blocks(
    table: Tensor,
    weights: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> Tensor:
    batch, heads, blocks = table.shape[:3]
    keys = codes.shape[3]
    key_blocks = -(-keys // block_size)
    out = table.new_full((batch, heads, blocks, keep), -1, dtype=torch.int32)
    numbers = torch.arange(key_blocks, device=table.device)
    step = chunk_blocks(table, codes)
    for start in range(0, blocks, step):
        part = slice(start, min(blocks, start + step))
        seen = _visible(part, keys, mask, is_causal, window, position, block_size, table.device)
        shares = _shares(table[:, :, part], weights[:, :, part], codes, seen, block_size)  # (B, H, n, L)
        any_seen = _by_block(seen, block_size).any(-1)  # (B or 1, H or 1, n, L)
        own = _first_positions(part, position, block_size, table.device)[:, None]
        shares = torch.where(numbers == 0, ALWAYS, shares).masked_fill_(~any_seen, -1)
        if local:
            stand_in = (numbers >= own // block_size) & (numbers <= (own + block_size - 1) // block_size)
            shares.masked_fill_(stand_in, ALWAYS)
        out[:, :, part, : min(keep, key_blocks)] = _largest(shares, keep)
    return out


def _largest(shares: Tensor, keep: int) -> Tensor:
    """(B, H, n, L) -> (B, H, n, min(K, L)): the blocks with the largest shares, ascending; those below 0 are -1."""
    count = shares.shape[-1]
    order = shares.flip(-1).sort(dim=-1, descending=True, stable=True)  # of equal ones, the later blocks first
    best, kept = order.values[..., :keep], count - 1 - order.indices[..., :keep]
    found = torch.where(best < 0, count, kept).sort(-1).values
    return found.masked_fill_(found == count, -1).to(torch.int32)


def _shares(table: Tensor, weights: Tensor, codes: Tensor, seen: Tensor, block_size: int) -> Tensor:
    """(B, H, n, r, M, 16), (B, H, n, r, 256), (B, H, P, S) -> (B, H, n, L) int64."""
    total = 0
    for i in range(table.shape[3]):
        levels = _estimates(table[:, :, :, i], codes)  # (B, H, n, S)
        given = weights[:, :, :, i].long().gather(-1, levels).mul_(seen)
        sums = _by_block(given, block_size).sum(-1)  # (B, H, n, L)
        total = total + (sums << SHARE_BITS) // sums.sum(-1, keepdim=True).clamp_(min=1)
    return torch.as_tensor(total)


def _estimates(table: Tensor, codes: Tensor) -> Tensor:
    """(B, H, n, M, 16), (B, H, P, S) -> (B, H, n, S) int64."""
    total = table.new_zeros((*table.shape[:3], codes.shape[3]), dtype=torch.int64)
    for m in range(table.shape[3]):
        code = (codes[:, :, m // 2] >> 4 * (m % 2)) & 15
        total += table[:, :, :, m].gather(-1, code[:, :, None].expand(-1, -1, table.shape[2], -1).long())
    return total.clamp_(max=255)


def _by_block(x: Tensor, block_size: int) -> Tensor:
    """(..., S) -> (..., L, block_size), filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % block_size)).unflatten(-1, (-1, block_size))


def _first_positions(part: slice, position: int, block_size: int, device: torch.device) -> Tensor:
    """(n,): beside which key the first query of each block stands."""
    return torch.arange(part.start, part.stop, device=device) * block_size + position


def _visible(
    part: slice,
    keys: int,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    device: torch.device,
) -> Tensor:
    """Which keys count for the query blocks: (B or 1, H or 1, n, S)."""
    places = torch.arange(keys, device=device)
    first = _first_positions(part, position, block_size, device)[:, None]  # (n, 1)
    seen = torch.ones_like(places, dtype=torch.bool).expand(1, 1, part.stop - part.start, keys)
    if mask is not None:
        seen = seen & (mask if mask.shape[2] == 1 else mask[:, :, part])
    if is_causal:
        seen = seen & (places <= first)
    if window:
        seen = seen & (places > first - window)
    return seen


def chunk_blocks(table: Tensor, codes: Tensor) -> int:
    """How many query blocks are computed together."""
    return max(1, CHUNK_BYTES // max(1, 8 * table.shape[0] * table.shape[1] * codes.shape[3]))


def workspace_bytes(
    table: Tensor,
    weights: Tensor,
    codes: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    keep: int,
    local: bool,
) -> int:
    """Levels, weights and places of the keys for the query blocks of a chunk."""
    batch, heads, blocks = table.shape[:3]
    keys, blocks = codes.shape[3], min(chunk_blocks(table, codes), blocks)
    key_blocks = -(-keys // block_size)
    rows = batch * heads * blocks
    return rows * (34 * keys + 8 * 8 * key_blocks + 8 * table.shape[3] * 256) + 8 * (keys + key_blocks)
