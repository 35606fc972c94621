"""Rows of `gated_activation_backward`.

N rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.harness import OpSpec

from . import activation, gated_activation


def oracle(dh: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, ...]:
    """Three (N, F) -> two (N, F), by autograd in float64."""
    wide = [t.double().requires_grad_() for t in (gate, up)]
    return torch.autograd.grad(gated_activation.oracle(*wide, kind), wide, dh.double())


def plain(dh: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, ...]:
    inputs = [t.detach().clone().requires_grad_() for t in (gate, up)]
    return torch.autograd.grad(gated_activation.plain(*inputs, kind), inputs, dh)


SPEC = OpSpec("gated_activation_backward", oracle, plain, exact=False)
CASES = activation.table(SPEC, 3)
