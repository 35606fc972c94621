"""Masks that are computed: the largest scores, and structured ones.

R rows, C columns, M = R * C entries, K of them in the mask.

Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024 (arXiv 2406.13175), section 3.1: SHiRA-WM, -Grad and -SNIP
take the largest of a score, SHiRA-Struct takes rows or columns and the diagonal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_count

# Read so many scores at once: on a CPU they stay in cache, elsewhere each piece costs a wait for the device.
_ENTRIES_AT_ONCE_CPU, _ENTRIES_AT_ONCE = 2**18, 2**24
_DIGIT_BITS = 16
_INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def largest(scores: Tensor, k: int) -> Tensor:
    """Positions of the k largest scores; among equal scores the lowest positions win.

    The k-th largest score is found by counting, 16 bits at a time, on integers: the result depends on
    nothing but the scores, while `torch.topk` does not say which ties it takes. Temporaries are bounded by a constant.

    Args:
        scores: any shape, M entries, read in row-major order; bf16, fp16, fp32 or fp64. Infinities are ordered, and
            -0.0 equals 0.0.
        k: 0 to M.

    Returns:
        (K,) int32, strictly ascending, on the device of `scores`.

    Raises:
        ValueError: k or the dtype is wrong, or there is a NaN among the scores.
    """
    check_count(k, scores.numel())
    if scores.dtype not in _INTEGERS:
        raise ValueError(f"scores must be bf16, fp16, fp32 or fp64, got {scores.dtype}")
    flat = scores.detach().reshape(-1)
    for start, piece in _pieces(flat):
        nans = piece.isnan()
        if bool(nans.any()):
            where = start + int(nans.to(torch.uint8).argmax())
            raise ValueError(f"scores must not hold a NaN, found one at flat position {where:,}")
    if k == 0:
        return torch.empty(0, dtype=torch.int32, device=flat.device)
    return _at_least(flat, *_threshold(flat, k))


def _pieces(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    size = _ENTRIES_AT_ONCE_CPU if flat.device.type == "cpu" else _ENTRIES_AT_ONCE
    return ((start, flat[start : start + size]) for start in range(0, flat.numel(), size))


def _keys(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(start, keys) of piece after piece: int64 keys in [-2^(b-1), 2^(b-1)) with the order of the b-bit scores."""
    for start, piece in _pieces(flat):
        bits = piece.masked_fill(piece == 0, 0).view(_INTEGERS[flat.dtype])  # one zero, not two
        largest_integer = torch.iinfo(bits.dtype).max
        # A negative float grows as its other bits shrink: flip them.
        yield start, (bits ^ ((bits >> (8 * bits.itemsize - 1)) & largest_integer)).to(torch.int64)


def _threshold(flat: Tensor, k: int) -> tuple[int, int]:
    """The key of the k-th largest score, and how many of the scores that equal it belong to the k largest."""
    bits, prefix, left = 8 * flat.dtype.itemsize, 0, k
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = torch.zeros(2**_DIGIT_BITS, dtype=torch.int64, device=flat.device)
        for _, keys in _keys(flat):
            digits = keys >> shift
            if shift + _DIGIT_BITS == bits:
                digits = digits + 2 ** (_DIGIT_BITS - 1)  # the first digit has the sign
            else:
                digits = digits[digits >> _DIGIT_BITS == prefix] & (2**_DIGIT_BITS - 1)
            counts += torch.bincount(digits, minlength=2**_DIGIT_BITS)
        above = counts.flip(0).cumsum(0)  # above[i]: how many have a digit of at least 2^16 - 1 - i
        place = int(torch.searchsorted(above, left))
        left -= int(above[place - 1]) if place else 0
        digit = 2**_DIGIT_BITS - 1 - place
        first = shift + _DIGIT_BITS == bits
        prefix = digit - 2 ** (_DIGIT_BITS - 1) if first else prefix << _DIGIT_BITS | digit
    return prefix, left


def _at_least(flat: Tensor, threshold: int, ties: int) -> Tensor:
    """Positions of the keys above the threshold and of the first `ties` that equal it."""
    found = []
    for start, keys in _keys(flat):
        taken = keys > threshold
        if ties:
            equal = (keys == threshold).nonzero()[:ties, 0]
            taken[equal] = True
            ties -= equal.numel()
        found.append((taken.nonzero()[:, 0] + start).to(torch.int32))
    return torch.cat(found)


def struct_indices(shape: tuple[int, int], k: int) -> Tensor:
    """A structured mask of exactly k entries: the diagonal, then whole lines, then a part of the last line.

    Lines are the rows if C <= R, else the columns: the shorter ones, of which more fit. With n lines begun, these are
    the lines floor(i * L / n) of the L there are, filled in this order; n is the smallest number that reaches k. If k
    is below the diagonal's length D = min(R, C), the mask is the entries floor(i * D / k) of the diagonal.

    Args:
        shape: (R, C).
        k: 0 to R * C.

    Returns:
        (K,) int32, strictly ascending, on the CPU.

    Raises:
        ValueError: k is out of its range.
    """
    rows, columns = shape
    check_count(k, rows * columns)
    length, num_lines = min(shape), max(shape)
    if k <= length:
        steps = torch.arange(k, dtype=torch.int64, device="cpu") * length // max(k, 1)
        return (steps * (columns + 1)).to(torch.int32)

    def reached(n: int) -> int:
        """Entries of the diagonal and n lines; ceil(n * D / L) of the lines cross the diagonal."""
        return length + n * length - -(-n * length // num_lines)

    n = bisect_left(range(num_lines), k, key=reached)
    lines = (torch.arange(n, dtype=torch.int64, device="cpu") * num_lines // n)[:, None]  # (n, 1)
    places = torch.arange(length, dtype=torch.int64, device="cpu")[None]  # (1, D)
    flat = lines * columns + places if columns <= rows else places * columns + lines  # (n, D)
    diagonal = torch.arange(length, dtype=torch.int64, device="cpu") * (columns + 1)
    off_diagonal = flat[lines != places][: k - length]
    return torch.cat([diagonal, off_diagonal]).sort().values.to(torch.int32)
