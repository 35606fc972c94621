"""Rows of `draw_rows`: integers, the same from every implementation.

The reference is the oracle; `tests/ops/test_draw_rows.py` checks it against Python integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memsave.ops.draw_rows import reference
from memsave.ops.philox import OFFSET_STREAM, row_words
from tests.harness import OpCase, OpSpec

from .inputs import inclusion, seed, strided

SPEC = OpSpec("draw_rows", oracle=reference.draw_rows, takes_empty=False)


def _args(n: int, k: int, value: int, sigma: float) -> Callable[[], tuple[Any, ...]]:
    return lambda: (inclusion(n, k, sigma), k, seed(value))


def _mark_at_an_end() -> tuple[Any, ...]:
    """The one mark lies exactly where the first interval ends: the second row is drawn."""
    first, second, _ = reference.permutation_keys(3, seed(5)).argsort().tolist()
    mark = int(row_words(torch.tensor(0), OFFSET_STREAM, seed(5))[0])
    q = torch.ones(3, dtype=torch.int64)
    q[first], q[second] = mark, 2**32 - mark - 1
    return q, 1, seed(5)


_SIZES = [  # N, k, seed, spread of the weights
    (2, 1, 0, 1.0),
    (33, 11, 2**63 - 1, 1.0),
    (64, 63, 7, 1.0),
    (100, 1, 8, 1.0),
    (128, 40, 2**32 + 5, 4.0),
    (4096, 1229, 9, 1.0),
    (70001, 21000, 2**62 + 3, 2.0),
]

CASES = [
    *(OpCase(SPEC, f"{n}x{k}", _args(n, k, value, sigma), large=n > 128) for n, k, value, sigma in _SIZES),
    OpCase(SPEC, "strided", lambda: (strided(inclusion(50, 20)), 20, seed(3))),
    OpCase(SPEC, "mark_at_an_end", _mark_at_an_end),
]
