"""For each query, the keys with the largest estimated products: a number of them, without repeats, none that is hidden.

B sequences, H heads, R rows of queries, S keys, M subspaces, P = ceil(M / 2), K keys to keep. Sparse multi-head
attention of SPT (arXiv 2312.10365), whose own kernels count equal codes instead, and repeat key 0 where there are fewer
than K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..pq_encode import MAX_CODEWORDS, MAX_SUBSPACES
from . import reference

MAX_KEYS = 2**31 - 1
FARTHEST = 2**61
"""From key 0, in keys: a quarter of what 64 bits hold."""
MAX_BLOCK = 2**16

_op = register(
    "pq_select(Tensor table, Tensor codes, Tensor? mask, bool is_causal, int window, int position, int keep) -> Tensor",
    fake=lambda table, codes, mask, is_causal, window, position, keep: table.new_empty(
        (*table.shape[:3], keep), dtype=torch.int32
    ),
    reference=reference,
    kernels=("native", "triton"),
)


def pq_select(
    table: Tensor, codes: Tensor, mask: Tensor | None, is_causal: bool, window: int, position: int, keep: int
) -> Tensor:
    """The `keep` visible keys of each row with the largest sums over subspaces of table[m, code[m, s]].

    Of equal ones the later keys are taken. A row that sees no more than `keep` keys gets all of them, once.

    Args:
        table: (B, H, R, M, 16) uint8, from `pq_table`.
        codes: (B, H, P, S) uint8, from `pq_encode`.
        mask: bool, True where a row sees a key, broadcast to (B, H, R, S); or None.
        is_causal: row r sees key s only for s <= position + r.
        window: from 1 on: row r sees key s only for s > position + r - window; 0 for no such limit.
        position: which key row 0 stands beside.
        keep: K, from 1 on.

    Returns:
        (B, H, R, K) int32, ascending, with -1 behind the last key of a row.

    Raises:
        ValueError: a tensor of another shape or dtype, a number outside its range, tensors on several devices.
    """
    _check.typed("table", table, torch.uint8, 5)
    batch, heads, rows, subspaces, entries = table.shape
    check_codes(codes, batch, heads, subspaces, entries)
    if not 1 <= keep <= MAX_KEYS:
        raise ValueError(f"keep must be at least 1 key for each row; got {keep}.")
    check_places(window, position)
    check_mask(mask, (batch, heads, rows, codes.shape[3]))
    _check.same_device(table=table, codes=codes, mask=mask)
    return _op(table, codes, mask, is_causal, window, position, keep)


def check_codes(codes: Tensor, batch: int, heads: int, subspaces: int, entries: int) -> None:
    """Raises ValueError where codes do not belong to a table with these sizes."""
    _check.typed("codes", codes, torch.uint8, 4)
    if entries != MAX_CODEWORDS or not 1 <= subspaces <= MAX_SUBSPACES:
        raise ValueError(
            f"table must have (M, {MAX_CODEWORDS}) as its last sizes, M from 1 to {MAX_SUBSPACES}; got "
            f"({subspaces}, {entries})."
        )
    expected = (batch, heads, (subspaces + 1) // 2)
    if codes.shape[:3] != expected:
        raise ValueError(f"codes must be (B, H, P, S) with (B, H, P) = {expected}; got {tuple(codes.shape)}.")


def check_places(window: int, position: int) -> None:
    """Raises ValueError where sums of these with numbers of keys could overflow, and for a negative window."""
    if not 0 <= window <= FARTHEST:
        raise ValueError(f"window must be a number of keys, or 0 for no limit; got {window}.")
    if abs(position) > FARTHEST:
        raise ValueError(f"position must be the number of a key, before or behind them at most; got {position}.")


def check_block_size(block_size: int) -> None:
    """Raises ValueError for less than one key, and where a block would be far longer than any."""
    if not 1 <= block_size <= MAX_BLOCK:
        raise ValueError(f"block_size must be at least 1, and at most {MAX_BLOCK}; got {block_size}.")


def check_mask(mask: Tensor | None, full: tuple[int, ...]) -> None:
    """Raises ValueError for a mask that is not bool or does not broadcast, with all of its dimensions."""
    if mask is None:
        return
    _check.typed("mask", mask, torch.bool, 4)
    if any(size not in (1, of) for size, of in zip(mask.shape, full, strict=True)):
        raise ValueError(f"mask must broadcast to {full}; got {tuple(mask.shape)}.")
