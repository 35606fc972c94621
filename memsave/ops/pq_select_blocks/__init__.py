"""For each block of queries, the blocks of keys that hold most of their estimated attention.

B sequences, H heads, N blocks of queries with r representatives each, S keys in blocks of a size, M subspaces,
P = ceil(M / 2), K key blocks to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from ..pq_select import check_block_size, check_codes, check_mask, check_places
from . import reference

LEVELS = 256

_op = register(
    "pq_select_blocks(Tensor table, Tensor weights, Tensor codes, Tensor? mask, bool is_causal, int window, "
    "int position, int block_size, int keep, bool local) -> Tensor",
    fake=lambda table, weights, codes, mask, is_causal, window, position, block_size, keep, local: table.new_empty(
        (*table.shape[:3], keep), dtype=torch.int32
    ),
    reference=reference,
    kernels=("native", "triton"),
)


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
    """The `keep` key blocks of each query block with the largest shares of the representatives' estimated attention.

    A representative gives key s the weight weights[sum over subspaces of table[m, code[m, s]]]. Its share of a block is
    floor(2^16 * its weights in the block / all its weights), and shares are added over representatives. Of equal blocks
    the later ones are taken. With `local`, the blocks in which the queries themselves stand are always kept, then the
    first block, if anything in it counts. What counts is what the first query of the block sees: so where it stands
    before the others, as in causal attention, the choice does not depend on what comes after any query.

    Args:
        table: (B, H, N, r, M, 16) uint8, from `pq_table`.
        weights: (B, H, N, r, 256) int32, from 0 to 2^24: of each sum.
        codes: (B, H, P, S) uint8, from `pq_encode`.
        mask: bool, True where a key counts for the block, broadcast to (B, H, N, S); or None.
        is_causal: a key counts only at the place of the first query of the block, or before.
        window: from 1 on: a key counts only fewer than so many places before the first query; 0: all.
        position: which key query 0 stands beside.
        block_size: of both kinds of blocks. Query block n stands beside keys position + n * block_size onwards.
        keep: K, from 1 on.
        local: whether the queries stand beside keys at all, as in self-attention.

    Returns:
        (B, H, N, K) int32, ascending, with -1 behind the last block: fewer where nothing in the others counts.

    Raises:
        ValueError: a tensor of another shape or dtype, a number outside its range, tensors on several devices.
    """
    _check.typed("table", table, torch.uint8, 6)
    _check.typed("weights", weights, torch.int32, 5)
    batch, heads, blocks, representatives, subspaces, entries = table.shape
    check_codes(codes, batch, heads, subspaces, entries)
    if weights.shape != (*table.shape[:4], LEVELS):
        raise ValueError(f"weights must be {(*table.shape[:4], LEVELS)}, as table is; got {tuple(weights.shape)}.")
    if keep < 1 or representatives < 1:
        raise ValueError(f"keep and the representatives of a block must be at least 1; got {keep}, {representatives}.")
    check_block_size(block_size)
    check_places(window, position)
    check_mask(mask, (batch, heads, blocks, codes.shape[3]))
    _check.same_device(table=table, weights=weights, codes=codes, mask=mask)
    return _op(table, weights, codes, mask, is_causal, window, position, block_size, keep, local)
