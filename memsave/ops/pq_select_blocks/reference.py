"""Plain PyTorch implementation of `pq_select_blocks`: the shares of some query blocks at a time, and the largest.

B sequences, H heads, N query blocks, r representatives, S keys in L blocks, K key blocks to keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pq_select.reference import chunk_rows, estimates, estimating_bytes, largest, largest_bytes, of_rows

LEVELS = 256
SHARE_BITS = 16


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
    out = table.new_full((batch, heads, blocks, keep), -1, dtype=torch.int32)
    codes = F.pad(codes, (0, -keys % block_size))
    step = chunk_rows(table, codes)
    for start in range(0, blocks, step):
        part = slice(start, min(blocks, start + step))
        first = torch.arange(part.start, part.stop, device=table.device)[:, None] * block_size + position  # (n, 1)
        hidden = _hidden(first, keys, codes.shape[3], None if mask is None else of_rows(mask, part), is_causal, window)
        near = first if local else None
        place = out[:, :, part, : codes.shape[3] // block_size]
        place.copy_(_select(table[:, :, part], weights[:, :, part], codes, hidden, near, block_size, keep))
    return out


def _hidden(first: Tensor, keys: int, length: int, mask: Tensor | None, is_causal: bool, window: int) -> Tensor:
    """Which keys do not count for query blocks: (1 or n, length), with a mask (B or 1, H or 1, 1 or n, length)."""
    places = torch.arange(length, device=first.device)
    hidden = places >= (first + 1).clamp_(max=keys) if is_causal else (places >= keys)[None]
    if window:
        hidden = (places <= first - window).logical_or_(hidden)
    if mask is not None:
        shown = mask if mask.shape[3] == 1 else F.pad(mask, (0, length - keys))
        hidden = hidden | shown.logical_not()
    return hidden


def _select(
    table: Tensor, weights: Tensor, codes: Tensor, hidden: Tensor, near: Tensor | None, block_size: int, keep: int
) -> Tensor:
    """(B, H, n, min(K, L)) int64: the key blocks of some query blocks, first of all those from place `near` on."""
    representatives, count = table.shape[3], codes.shape[3] // block_size
    always = (representatives << SHARE_BITS) + 1  # above all shares
    shares = table.new_zeros((*table.shape[:3], count), dtype=torch.int64)
    for i in range(representatives):
        shares += _shares(table[:, :, :, i], weights[:, :, :, i], codes, hidden, block_size)
    shares[..., :1] = always
    shares.masked_fill_(hidden.unflatten(-1, (count, block_size)).all(-1), -1)
    numbers = torch.arange(count, device=table.device)
    if near is not None:
        to = (near + block_size - 1).div_(block_size, rounding_mode="floor")
        stand_in = (numbers >= near.div(block_size, rounding_mode="floor")).logical_and_(numbers <= to)
        shares.masked_fill_(stand_in, always)
    return largest(shares.mul_(count).add_(numbers), keep)  # of equal shares, the later block's


def _shares(table: Tensor, weights: Tensor, codes: Tensor, hidden: Tensor, block_size: int) -> Tensor:
    """(B, H, n, M, 16), (B, H, n, 256), (B, H, P, S) -> (B, H, n, L) int64, of one representative each."""
    levels = estimates(table, codes).clamp_(max=LEVELS - 1)
    given = weights.long().gather(-1, levels).masked_fill_(hidden, 0)
    sums = given.unflatten(-1, (codes.shape[3] // block_size, block_size)).sum(-1)
    whole = sums.sum(-1, keepdim=True).clamp_(min=1)
    return sums.bitwise_left_shift_(SHARE_BITS).div_(whole, rounding_mode="floor")


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
    """The codes of whole blocks, which keys are hidden, and the levels and weights of those of one representative."""
    batch, heads, blocks = table.shape[:3]
    count = -(-codes.shape[3] // block_size)
    whole = codes.new_empty((*codes.shape[:3], count * block_size), device="meta")
    n = min(chunk_rows(table, whole), blocks)
    if not n:
        return whole.numel()
    rows, keys = batch * heads * n, whole.shape[3]
    of_mask = (1, 1, 1) if mask is None else (*mask.shape[:2], min(mask.shape[2], n))
    hidden = of_mask[0] * of_mask[1] * max(of_mask[2], n if is_causal or window else 1) * keys
    levels = 8 * rows * keys
    weighing = levels + max(8 * rows * LEVELS, 8 * rows * count + 8 * rows)
    ordering = 8 * count + (8 * n if local else 0) + largest_bytes(rows, count, keep)
    beside = max(levels + max(estimating_bytes(table, whole, n), weighing), ordering)
    return whole.numel() + 8 * n + hidden + 8 * rows * count + beside
