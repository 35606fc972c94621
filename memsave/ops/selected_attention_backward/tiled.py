"""`selected_attention_backward` in plain PyTorch, for every device: scores made again, for some query blocks at a time.

Shapes as in `selected_attention/blocks.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selected_attention.blocks import (
    Dropping,
    Head,
    Visibility,
    by_query_block,
    chunk_bytes,
    chunks,
    gathered,
    heads,
    in_blocks,
    in_blocks_bytes,
    row_slice,
    scores,
    statistics_dtype,
    write_rows,
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
    dropping: Dropping | None = None,
) -> Tensor:
    """What the op returns and adds; with `dropping`, for what forward dropped."""
    dquery = query.new_zeros(query.shape)
    if 0 in (query.shape[1], key.shape[2], indices.shape[3]):
        return dquery
    visibility = Visibility(mask, is_causal, window, position)
    with torch.autocast(query.device.type, enabled=False):
        for b, g, of_queries, head in heads(query, key, value, indices, visibility, block_size):
            given = doutput[b, of_queries], output[b, of_queries], logsumexp[b, of_queries]
            _differentiate(head, scale, dropping, *given, dquery[b, of_queries], dkey[b, g], dvalue[b, g])
    return dquery


def _differentiate(
    head: Head,
    scale: float,
    dropping: Dropping | None,
    doutput: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """Write dquery (g, R, D) of one head, and add to dkey (S, D) and dvalue (S, E)."""
    size, count = head.block_size, head.key.shape[0]
    key, value = in_blocks(head.key, size), in_blocks(head.value, size)
    sums = [torch.zeros(t.shape, dtype=dkey.dtype, device=dkey.device) for t in (key, value)]  # (L, b D), (L, b E)
    for part in chunks(head):
        rows = row_slice(head, part)
        given = doutput[:, rows], output[:, rows], logsumexp[:, rows, None]
        _differentiate_chunk(head, part, key, value, scale, dropping, *given, dquery[:, rows], *sums)
    for total, of in zip(sums, (dkey, dvalue), strict=True):
        of += total.view(len(total) * size, of.shape[1])[:count]


def _differentiate_chunk(
    head: Head,
    part: slice,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropping: Dropping | None,
    doutput: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """The same for some query blocks: doutput (g, rows, E), logsumexp (g, rows, 1), dkey (L, b D), dvalue (L, b E)."""
    size, kept = head.block_size, head.indices[part].clamp(min=0)
    blocks, flat = len(kept), kept.flatten()
    q = by_query_block(head.query[:, row_slice(head, part)], blocks, size)
    dy = by_query_block(doutput, blocks, size)
    delta = by_query_block(output, blocks, size).mul_(dy).sum(-1, keepdim=True)
    k, v = gathered(key, kept, size), gathered(value, kept, size)
    shift = by_query_block(logsumexp, blocks, size)
    # A row that sees nothing has -inf in both.
    p = scores(head, part, q, k, scale).sub_(shift.masked_fill_(shift == float("-inf"), 0.0)).exp_()
    dropped = None if dropping is None else dropping.factors(p)
    weights = p if dropped is None else p * dropped
    dvalue.index_add_(0, flat, torch.bmm(weights.mT, dy).view(len(flat), dvalue.shape[1]))
    dp = torch.bmm(dy, v.mT)
    if dropped is not None:
        dp.mul_(dropped)
    ds = dp.sub_(delta).mul_(p).mul_(scale)
    dkey.index_add_(0, flat, torch.bmm(ds.mT, q).view(len(flat), dkey.shape[1]))
    write_rows(torch.bmm(ds, k), dquery, size)


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
    if 0 in (*query.shape[:3], key.shape[2], indices.shape[3]):
        return 0
    visibility = Visibility(mask, is_causal, window, position)
    at = chunk_bytes(query, key, value, indices, visibility, block_size)
    keys = -(-key.shape[2] // block_size) * block_size
    sums = statistics_dtype(query).itemsize * keys * (key.shape[3] + value.shape[3])
    scoring = max(at.hidden, at.value)
    gradients = at.scores + max(at.key, at.query)
    whole = at.key + at.value + at.number + at.scores + max(scoring, gradients)
    chunk = (
        at.query
        + at.output
        + max(at.output, at.of_key + at.number, at.key + at.of_value + at.number, at.number + whole)
    )
    return in_blocks_bytes(key, block_size) + in_blocks_bytes(value, block_size) + sums + at.kept + chunk
