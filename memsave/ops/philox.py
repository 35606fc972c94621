"""Philox 4x32-10, a counter-based random generator, in plain PyTorch on integers.

A random word is a pure function of (seed, stream, row), so every backend draws the same rows, whatever its
threads or blocks. 32-bit words are held in int64 tensors as values in [0, 2^32).

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from torch import Tensor

MASK32 = 0xFFFFFFFF

# One stream for each purpose, so that no two of them ever read the same words.
PERMUTATION_STREAM = 0
OFFSET_STREAM = 1
REPLACEMENT_STREAM = 2
MASK_STREAM = 3  # files hold only the seed of such a mask: never change this one

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_KEY_STEP_0, _KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the 64-bit product: int64 wraps around, and the mask undoes the sign of the shift."""
    product = b * a
    return (product >> 32) & MASK32, product & MASK32


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The four 32-bit words for a counter of four and a key of two 32-bit words (int64 tensors that broadcast)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(_MULTIPLIER_0, c0)
        high_1, low_1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _KEY_STEP_0) & MASK32, (k1 + _KEY_STEP_1) & MASK32
    return c0, c1, c2, c3


def row_words(rows: Tensor, stream: int, seed: Tensor) -> Words:
    """Four random words for each row: counter (row low, row high, stream, 0), key (seed low, seed high).

    Args:
        rows: int64, any shape, non-negative.
        stream: one of the constants above.
        seed: int64, 0-d, on the device of `rows`.
    """
    zero = rows.new_zeros(())
    counter = (rows & MASK32, rows >> 32, zero + stream, zero)
    return philox(counter, (seed & MASK32, (seed >> 32) & MASK32))
