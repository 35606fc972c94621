"""Rows of `activation_backward`.

N rows, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.harness import OpSpec

from . import activation


def oracle(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    """(N, F), (N, F) -> (N, F), by autograd in float64."""
    wide = x.double().requires_grad_()
    return torch.autograd.grad(activation.oracle(wide, kind), wide, dy.double())[0]


def plain(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(activation.plain(x, kind), x, dy)[0].contiguous()


SPEC = OpSpec("activation_backward", oracle, plain, exact=False)
CASES = activation.table(SPEC, 2)
