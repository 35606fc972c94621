"""Random masks that a file can hold as a seed: K of M positions, the same bits everywhere.

The mask is the set of the first K distinct values of a stream of integers in [0, M): value 2i is word1:word0 of Philox
row i, value 2i + 1 is word3:word2, each cut to 62 bits, modulo M. That favours a position by at most 2^-31 of its
probability. Above M / 2 the K positions are those that a mask of M - K does not hold. Integers alone decide, so no
version of torch, device or platform changes the result.

Source of the random mask: Bhardwaj et al., "Sparse High Rank Adapters", 2024 (arXiv 2406.13175), section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops.philox import MASK_STREAM, row_words
from .checks import check_count

# Philox runs over so many rows at once: its temporaries stay in cache.
_ROWS_AT_ONCE = 2**15
_MASK30 = 2**30 - 1


def random_indices(numel: int, k: int, seed: int) -> Tensor:
    """A uniformly random subset of [0, numel), a function of (numel, k, seed) alone.

    Args:
        numel: M, at most 2^31 - 1.
        k: how many, 0 to M.
        seed: in [0, 2^63).

    Returns:
        (K,) int32, strictly ascending, on the CPU. Memory and time are proportional to K.

    Raises:
        ValueError: an argument out of its range.
    """
    check_count(k, numel)
    if not 0 <= seed < 2**63:
        raise ValueError(f"the seed of a random mask must be in [0, 2^63), got {seed}")
    if 2 * k <= numel:
        return _distinct(numel, k, seed)
    kept = torch.ones(numel, dtype=torch.bool, device="cpu")
    kept[_distinct(numel, numel - k, seed)] = False
    return kept.nonzero()[:, 0].to(torch.int32)


def _distinct(numel: int, k: int, seed: int) -> Tensor:
    """The first k <= numel / 2 distinct values of the stream, sorted: (k,) int32."""
    if k == 0:
        return torch.empty(0, dtype=torch.int32, device="cpu")
    # How many draws k distinct values take on average, and some more. This decides about time alone: the first k
    # distinct values are the same however many follow.
    num_rows = (math.ceil(-numel * math.log1p(-k / numel) + 4 * math.sqrt(k)) + 16) // 2
    draws = _stream(0, num_rows, numel, seed)
    while True:
        values, order = draws.sort(stable=True)
        first = torch.ones(values.shape, dtype=torch.bool, device="cpu")
        torch.ne(values[1:], values[:-1], out=first[1:])
        values, order = values[first], order[first]  # stable: a value's first place in the stream
        if values.numel() >= k:
            return values[order <= order.kthvalue(k).values]
        more = num_rows // 8 + 16
        draws = torch.cat([draws, _stream(num_rows, num_rows + more, numel, seed)])
        num_rows += more


def _stream(start: int, stop: int, numel: int, seed: int) -> Tensor:
    """The values of rows [start, stop): (2 * (stop - start),) int32."""
    key = torch.tensor(seed, dtype=torch.int64, device="cpu")
    values = torch.empty(stop - start, 2, dtype=torch.int32, device="cpu")
    for begin in range(start, stop, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, stop)
        rows = torch.arange(begin, end, dtype=torch.int64, device="cpu")
        word_0, word_1, word_2, word_3 = row_words(rows, MASK_STREAM, key)
        values[begin - start : end - start, 0] = ((word_1 & _MASK30) << 32 | word_0) % numel
        values[begin - start : end - start, 1] = ((word_3 & _MASK30) << 32 | word_2) % numel
    return values.reshape(-1)
