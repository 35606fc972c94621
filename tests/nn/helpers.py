"""Small models and the comparisons that the tests of `memsave.nn` share."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import memsave


class HFStyleRMSNorm(nn.Module):
    """The RMSNorm that most transformers models define; structure and rounding are what counts."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class Block(nn.Module):
    """A norm whose output three linears read, as in attention; the output adds them up."""

    def __init__(self, norm: nn.Module, width: int = 8, out: int = 6) -> None:
        super().__init__()
        self.norm = norm
        self.q, self.k, self.v = (nn.Linear(width, out) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.q(y).tanh() * self.k(y).tanh() + self.v(y)


def converted(model: nn.Module, *configs: memsave.MethodConfig) -> nn.Module:
    """A converted deep copy of `model`."""
    model = copy.deepcopy(model)
    memsave.convert_model(model, list(configs) or None)
    return model


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The input's and the parameters' gradients of a weighted sum of run(x)."""
    x = x.detach().clone().requires_grad_(True)
    model.zero_grad()
    y = run(x)
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y))
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(actual: list[Tensor], expected: list[Tensor], ulps: float = 32) -> None:
    """Equal dtypes and, relative to each tensor's largest entry, values within `ulps` of that dtype's epsilon."""
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and a.shape == e.shape
        error = (a.double() - e.double()).abs().max() / e.double().abs().max()
        assert error <= ulps * torch.finfo(e.dtype).eps, float(error)
