"""Calls the C++ kernel of `selected_attention`, csrc/selected_attention.cpp, for lists of single keys.

Blocks are matrix products, which torch does best: they go to the plain implementation. So do head sizes above 256.
B sequences, h query and kv key/value heads, R queries, S keys, K keys in a list.
"""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

from torch import Tensor

from .._native import DTYPE_CODES, function
from . import reference
from .blocks import statistics_dtype

MAX_HEAD_SIZE = 256  # kMaxHead in csrc/selected_keys.h
PIECES = 16  # of the rows, each with scratch memory of its own
TILE_ROWS = 16  # kTileRows in csrc/selected_attention.cpp

_kernel = function(
    "ms_selected_attention",
    *(c_void_p, c_void_p, c_void_p, c_void_p),  # query, key, value, strides
    *(c_int64, c_void_p, c_void_p, c_double),  # dtype, lists, sizes, scale
    *(c_int64, c_void_p, c_void_p, c_void_p),  # pieces, scratch, output, logsumexp
)


def launch(
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
    if not serves(query, value, block_size):
        return reference.selected_attention(
            query, key, value, indices, mask, is_causal, window, position, block_size, scale
        )
    query, key, value, indices = by_rows(query), by_rows(key), by_rows(value), indices.contiguous()
    wide = statistics_dtype(query)
    output = query.new_empty((*query.shape[:3], value.shape[3]))
    logsumexp = query.new_empty(query.shape[:3], dtype=wide)
    scratch = query.new_empty(_scratch_elements(query, key, value, indices), dtype=wide)
    counts = numbers(*sizes(query, key, value, indices), key.shape[2])
    wrong = _kernel(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), numbers(*row_strides(query, key, value))),
        *(DTYPE_CODES[query.dtype], indices.data_ptr(), counts, scale),
        *(PIECES, scratch.data_ptr(), output.data_ptr(), logsumexp.data_ptr()),
    )
    refuse(wrong, indices, key.shape[2])
    return output, logsumexp


def refuse(wrong: int, indices: Tensor, keys: int) -> None:
    """Raises IndexError for the list of this number, unless it is -1."""
    if wrong >= 0:
        raise IndexError(
            f"indices: list {wrong} is {indices.view(-1, indices.shape[3])[wrong].tolist()}; expected ascending "
            f"numbers in [0, {keys}), then -1. Nothing was computed."
        )


def serves(query: Tensor, value: Tensor, block_size: int) -> bool:
    return block_size == 1 and query.shape[3] <= MAX_HEAD_SIZE and value.shape[3] <= MAX_HEAD_SIZE


def by_rows(x: Tensor) -> Tensor:
    """x with neighbouring features next to each other in memory; a copy where they are not."""
    return x if _has_rows(x) else x.contiguous()


def copied_bytes(*tensors: Tensor) -> int:
    """What `by_rows` allocates."""
    return sum(0 if _has_rows(x) else x.numel() * x.element_size() for x in tensors)


def _has_rows(x: Tensor) -> bool:
    return x.stride(3) == 1 or x.shape[3] == 1 or x.numel() == 0


def numbers(*values: int) -> object:
    """An array of int64 for C."""
    return (c_int64 * len(values))(*values)


def row_strides(*tensors: Tensor) -> list[int]:
    """Those of batch, heads and rows."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def sizes(query: Tensor, key: Tensor, value: Tensor, indices: Tensor) -> tuple[int, ...]:
    """B, kv, g, R, D, E, K."""
    groups = key.shape[1]
    heads, rows, features = query.shape[1:]
    return query.shape[0], groups, heads // groups, rows, features, value.shape[3], indices.shape[3]


def _scratch_elements(query: Tensor, key: Tensor, value: Tensor, indices: Tensor) -> int:
    tiles = key.shape[0] * key.shape[1] * -(-query.shape[2] // TILE_ROWS)
    group = query.shape[1] // key.shape[1]
    return min(PIECES, tiles) * TILE_ROWS * group * (indices.shape[3] + value.shape[3])


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
    """The scores and sums of some rows for each piece."""
    if not serves(query, value, block_size):
        return reference.workspace_bytes(
            query, key, value, indices, mask, is_causal, window, position, block_size, scale
        )
    lists = 0 if indices.is_contiguous() else 4 * indices.numel()
    scratch = statistics_dtype(query).itemsize * _scratch_elements(query, key, value, indices)
    return copied_bytes(query, key, value) + lists + scratch
