"""Rows of `gated_activation`.

N rows, F features.
"""

from __future__ import annotations

from torch import Tensor

from tests.harness import OpSpec

from . import activation


def oracle(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """(N, F), (N, F) -> (N, F), in float64."""
    return activation.oracle(gate, kind) * up.double()


def plain(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    return activation.plain(gate, kind) * up


SPEC = OpSpec("gated_activation", oracle, plain, exact=False)
CASES = activation.table(SPEC, 2)
