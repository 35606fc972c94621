"""Indices as bytes: the gaps between them, each a varint.

K indices of a matrix with M entries. The first index and then each difference minus one is written in 7-bit groups, the
lowest first, with the top bit set on all bytes of a number but its last (LEB128). A random mask of 1% takes 1.28 bytes
per index, one of 0.1% 1.88. A mask has exactly one code: a number with a needless zero at its end is refused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_count, check_indices

_MAX_BYTES = 5  # of a number below 2^31


def encode_gaps(indices: Tensor) -> Tensor:
    """The code of a mask.

    Args:
        indices: (K,) int32, strictly ascending, non-negative.

    Returns:
        (B,) uint8 with K <= B <= 5 K, on the device of `indices`.

    Raises:
        ValueError: the indices are not as they should be.
    """
    check_indices(indices)
    gaps = indices.clone()
    gaps[1:] -= indices[:-1] + 1
    lengths = torch.ones_like(gaps)
    for place in range(1, _MAX_BYTES):
        lengths += gaps >= 2 ** (7 * place)
    starts = lengths.cumsum(0) - lengths  # int64: there may be more than 2^31 bytes
    codes = torch.empty(int(lengths.sum()), dtype=torch.uint8, device=indices.device)
    longer = torch.ones_like(gaps, dtype=torch.bool)
    for place in range(_MAX_BYTES):
        groups, starts, lengths = gaps[longer] >> 7 * place, starts[longer], lengths[longer]
        gaps, longer = gaps[longer], lengths > place + 1
        codes[starts + place] = (groups & 127 | longer.to(torch.int32) << 7).to(torch.uint8)
    return codes


def decode_gaps(codes: Tensor, k: int, numel: int) -> Tensor:
    """The mask of a code that may be damaged or made to harm: whatever it holds, the result is a valid mask.

    Memory is proportional to the number of bytes, whatever k and numel claim.

    Args:
        codes: (B,) uint8, as from `encode_gaps`.
        k: how many indices it must hold.
        numel: M: every index must be below.

    Returns:
        (K,) int32, strictly ascending, in [0, M), on the device of `codes`.

    Raises:
        ValueError: with a sentence that says what is wrong with the code.
    """
    check_count(k, numel)
    if codes.dtype != torch.uint8 or codes.dim() != 1:
        raise ValueError(f"coded indices must be a 1-D uint8 tensor, got shape {tuple(codes.shape)}, {codes.dtype}")
    starts, lengths = _numbers(codes, k)
    gaps = torch.zeros(k, dtype=torch.int64, device=codes.device)
    for place in range(_MAX_BYTES):
        longer = (lengths > place).nonzero()[:, 0]
        groups = codes[starts[longer] + place].to(torch.int64) & 127
        gaps[longer] |= groups << 7 * place
        if place and bool(((lengths[longer] == place + 1) & (groups == 0)).any()):
            raise ValueError("the coded indices hold a number with a needless zero byte at its end")
    if bool((gaps >= numel).any()):  # before the sum, which cannot overflow then
        raise ValueError(f"the coded indices hold a gap beyond the matrix, which has {numel:,} entries")
    indices = (gaps + 1).cumsum(0) - 1
    if k and int(indices[-1]) >= numel:
        raise ValueError(f"the coded indices go up to {int(indices[-1]):,}, but the matrix has {numel:,} entries")
    return indices.to(torch.int32)


def _numbers(codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where each number starts (K,) and how many bytes it has (K,), int64; ValueError if they are not k sound ones."""
    if not k <= codes.numel() <= _MAX_BYTES * k:
        raise ValueError(f"{k:,} coded indices take {k:,} to {_MAX_BYTES * k:,} bytes, but there are {codes.numel():,}")
    ends = (codes < 128).nonzero()[:, 0]
    if codes.numel() and bool(codes[-1] >= 128):
        raise ValueError("the coded indices are truncated: their last byte asks for another one")
    if ends.numel() != k:
        raise ValueError(f"the code must hold {k:,} indices, but it holds {ends.numel():,}")
    lengths = ends.clone()
    lengths[:1] += 1
    lengths[1:] -= ends[:-1]
    if k and int(lengths.max()) > _MAX_BYTES:
        raise ValueError(f"the coded indices hold a number of {int(lengths.max())} bytes; at most 5 are allowed")
    return ends - lengths + 1, lengths
