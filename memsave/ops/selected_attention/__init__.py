"""Attention of each query to chosen keys alone: single ones, or blocks of them for a block of queries.

B sequences, h query and kv key/value heads (h a multiple of kv; query head i reads key/value head i // (h / kv)), R
queries, S keys, head sizes D and E; N = ceil(R / block_size) blocks of queries, K key blocks for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..pq_select import check_block_size, check_mask, check_places
from . import reference
from .blocks import statistics_dtype

_op = register(
    "selected_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? mask, bool is_causal, "
    "int window, int position, int block_size, float scale) -> (Tensor, Tensor)",
    fake=lambda query, key, value, *_: (
        query.new_empty((*query.shape[:3], value.shape[3])),
        query.new_empty(query.shape[:3], dtype=statistics_dtype(query)),
    ),
    reference=reference,
    kernels=("native", "triton"),
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
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q K^T) V over the keys that `indices` names and that are visible, computed at least in float32.

    A query that sees no key gets zeros, and a log-sum-exp of -inf. Values that are not finite may reach queries that do
    not see them, through blocks that are chosen in part.

    Args:
        query: (B, h, R, D) floating point, any strides.
        key, value: (B, kv, S, D) and (B, kv, S, E), dtype of query, any strides.
        indices: (B, kv, N, K) int32: ascending numbers of key blocks (of single keys for block_size 1), without
            repeats, then -1. On CUDA and for blocks, other values lead to undefined results.
        mask: bool, True where a query sees a key, broadcast to (B, kv, R, S); or None.
        is_causal, window, position: see `pq_select`.
        block_size: of the blocks of queries and of keys; the last ones may be smaller.
        scale: of the scores.

    Returns:
        output (B, h, R, E) of dtype of query, and logsumexp (B, h, R) float32, float64 for float64.

    Raises:
        ValueError: a tensor of another shape or dtype, a number outside its range, tensors on several devices; a mask,
            is_causal or window with block_size 1, where indices say it all.
        IndexError: a list of single keys that is not as said, on the CPU.
        RuntimeError: an input requires grad while grad mode is on.
    """
    check_inputs(query, key, value, indices, mask, is_causal, window, position, block_size)
    output, logsumexp = _op(query, key, value, indices, mask, is_causal, window, position, block_size, scale)
    return output, logsumexp


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
) -> None:
    """Raises ValueError for what `selected_attention` and its backward do not take."""
    _check.floating("query", query, 4)
    _check.typed("key", key, query.dtype, 4)
    _check.typed("value", value, query.dtype, 4)
    _check.typed("indices", indices, torch.int32, 4)
    batch, heads, rows, features = query.shape
    groups, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != features or not groups or heads % groups:
        raise ValueError(
            f"key must be (B, kv, S, D) with B = {batch}, D = {features} and h = {heads} a multiple of kv; got "
            f"{tuple(key.shape)}."
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must be (B, kv, S, E) with the sizes of key, {tuple(key.shape[:3])}; got {tuple(value.shape)}."
        )
    check_block_size(block_size)
    expected = (batch, groups, -(-rows // block_size))
    if indices.shape[:3] != expected:
        raise ValueError(f"indices must be (B, kv, N, K) with (B, kv, N) = {expected}; got {tuple(indices.shape)}.")
    if block_size == 1 and (mask is not None or is_causal or window):
        raise ValueError("mask, is_causal and window are for blocks; with block_size 1 indices name visible keys only.")
    check_places(window, position)
    check_mask(mask, (batch, groups, rows, keys))
    _check.same_device(query=query, key=key, value=value, indices=indices, mask=mask)
