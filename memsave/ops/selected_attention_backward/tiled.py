"""`selected_attention_backward` in plain PyTorch, for every device: scores made again, for some query blocks at a time.

Shapes as in `selected_attention/blocks.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selected_attention.blocks import (
    Head,
    Visibility,
    by_query_block,
    chunks,
    gathered,
    heads,
    in_blocks,
    row_slice,
    scores,
    to_rows,
)


def selected_attention_backward(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> Tensor:
    dquery = query.new_zeros(query.shape)
    if 0 in (query.shape[1], key.shape[2], indices.shape[3]):
        return dquery
    visibility = Visibility(mask, is_causal, window, position)
    with torch.autocast(query.device.type, enabled=False):
        for b, g, of_queries, head in heads(query, key, value, indices, visibility, block_size):
            given = doutput[b, of_queries], output[b, of_queries], logsumexp[b, of_queries]
            _differentiate(head, scale, *given, dquery[b, of_queries], dkey[b, g], dvalue[b, g])
    return dquery


def _differentiate(
    head: Head,
    scale: float,
    doutput: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Write dquery (g, R, D) of one head, and add to dkey (S, D) and dvalue (S, E)."""
    groups, size, count = head.query.shape[0], head.block_size, head.key.shape[0]
    key, value = in_blocks(head.key, size), in_blocks(head.value, size)
    sums = [torch.zeros(t.shape, dtype=dkey.dtype, device=dkey.device) for t in (key, value)]  # (L, b D), (L, b E)
    for part in chunks(head):
        rows = row_slice(head, part)
        kept = head.indices[part].clamp(min=0)
        flat = kept.flatten()
        q = by_query_block(head.query[:, rows], part, size)
        dy = by_query_block(doutput[:, rows], part, size)
        delta = (dy * by_query_block(output[:, rows], part, size)).sum(-1, keepdim=True)
        k, v = gathered(key, kept, size), gathered(value, kept, size)
        shift = by_query_block(logsumexp[:, rows, None], part, size)
        # A row that sees nothing has -inf in both.
        p = scores(head, part, q, k, scale).sub_(shift.masked_fill_(shift == float("-inf"), 0.0)).exp_()
        sums[1].index_add_(0, flat, torch.bmm(p.mT, dy).view(flat.shape[0], value.shape[1]))
        ds = torch.bmm(dy, v.mT).sub_(delta).mul_(p).mul_(scale)
        sums[0].index_add_(0, flat, torch.bmm(ds.mT, q).view(flat.shape[0], key.shape[1]))
        dquery[:, rows] = to_rows(torch.bmm(ds, k), groups, rows.stop - rows.start)
    for total, of in zip(sums, (dkey, dvalue), strict=True):
        of += total.view(len(total) * size, of.shape[1])[:count]


def workspace_bytes(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> int:
    """The sums of one head, and what a chunk needs."""
    return 0
