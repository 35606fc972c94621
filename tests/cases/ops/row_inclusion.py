"""Rows of `row_inclusion`: integers, the same from every implementation.

The reference is the oracle; `tests/ops/test_row_inclusion.py` checks it against exact fractions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from memsave.ops.row_inclusion import reference
from tests.harness import OpCase, OpSpec

from .inputs import weights

SPEC = OpSpec("row_inclusion", oracle=reference.row_inclusion, takes_empty=False)


def _args(make_weights: Callable[[], Tensor], k: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (make_weights(), k)


CASES = [OpCase(SPEC, name, _args(make, k), large=large) for name, make, k, large in weights()]
