"""Rows of `draw_winners`: the same from every implementation.

The reference is the oracle; `tests/ops/test_draw_winners.py` checks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memsave.ops.draw_winners import reference
from tests.harness import OpCase, OpSpec

from .inputs import seed, weights

SPEC = OpSpec("draw_winners", oracle=reference.draw_winners, takes_empty=False)


def _args(make_weights: Callable[[], Tensor], k: int, winners: bool) -> Callable[[], tuple[Any, ...]]:
    return lambda: (make_weights(), k, seed(2**40 + k), winners)


CASES = [
    OpCase(SPEC, f"{'wta_crs' if winners else 'crs'}_{name}", _args(make, k, winners), large=large)
    for name, make, k, large in weights()
    for winners in (False, True)
]
