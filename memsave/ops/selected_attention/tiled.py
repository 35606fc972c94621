"""`selected_attention` in plain PyTorch, for every device: matrix products of query blocks with gathered key blocks.

Shapes as in `blocks.py`. The scores of a chunk are all that is there at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import (
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


def selected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
    dropping: Dropping | None = None,
) -> tuple[Tensor, Tensor]:
    """What the op returns. With `dropping`, which the op does not know, some weights are dropped after the softmax."""
    output = query.new_zeros((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_full(query.shape[:3], float("-inf"), dtype=statistics_dtype(query))
    if 0 in (query.shape[1], key.shape[2], indices.shape[3]):
        return output, logsumexp
    visibility = Visibility(mask, is_causal, window, position)
    with torch.autocast(query.device.type, enabled=False):
        for b, _, of_queries, head in heads(query, key, value, indices, visibility, block_size):
            _attend(head, scale, dropping, output[b, of_queries], logsumexp[b, of_queries])
    return output, logsumexp


def _attend(head: Head, scale: float, dropping: Dropping | None, output: Tensor, logsumexp: Tensor) -> None:
    """Write output (g, R, E) and logsumexp (g, R) of one head."""
    key, value = in_blocks(head.key, head.block_size), in_blocks(head.value, head.block_size)
    for part in chunks(head):
        rows = row_slice(head, part)
        _attend_chunk(head, part, key, value, scale, dropping, output[:, rows], logsumexp[:, rows, None])


def _attend_chunk(
    head: Head,
    part: slice,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropping: Dropping | None,
    output: Tensor,
    logsumexp: Tensor,
) -> None:
    """The same for some query blocks: output (g, rows, E), logsumexp (g, rows, 1)."""
    size, kept = head.block_size, head.indices[part].clamp(min=0)
    q = by_query_block(head.query[:, row_slice(head, part)], len(kept), size)
    p = scores(head, part, q, gathered(key, kept, size), scale)
    peak = p.amax(-1, keepdim=True)
    peak.masked_fill_(peak == float("-inf"), 0.0)  # a row that sees nothing
    p.sub_(peak).exp_()
    total = p.sum(-1, keepdim=True)
    if dropping is not None:
        p.mul_(dropping.factors(p))
    y = torch.bmm(p, gathered(value, kept, size)).div_(total.clamp(min=torch.finfo(p.dtype).tiny))
    write_rows(y, output, size)
    write_rows(total.log_().add_(peak), logsumexp, size)


def workspace_bytes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> int:
    """The blocks of one head where they are no view, and queries, keys, values, scores and output of a chunk."""
    if 0 in (*query.shape[:3], key.shape[2], indices.shape[3]):
        return 0
    visibility = Visibility(mask, is_causal, window, position)
    at = chunk_bytes(query, key, value, indices, visibility, block_size)
    scoring = max(at.of_key, at.key + at.scores + at.hidden)
    weighing = at.scores + 2 * at.number + max(at.of_value, at.value + at.output, at.output + at.number)
    return (
        in_blocks_bytes(key, block_size)
        + in_blocks_bytes(value, block_size)
        + at.kept
        + at.query
        + max(scoring, weighing)
    )
