"""Small models to calibrate, their batches, and all that must stay as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...snapshot import snapshot

NAMES = ("0.weight", "2.weight", "4.weight")


def mlp(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*parts).to(dtype)


def data(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator, dtype=dtype) for _ in range(count)]


def square(output: Tensor) -> Tensor:
    return output.square().mean()


def weights_of(model: nn.Module, names: tuple[str, ...] = NAMES) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in names}


class Counting(nn.Module):
    """Layers of one size, which count how many live bytes of gradients there are."""

    def __init__(self, layers: int, features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, features, bias=False) for _ in range(layers))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def surroundings(model: nn.Module) -> Any:
    """What `snapshot` does not see."""
    grads = {name: (id(p.grad), None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = {name: dict(p._post_accumulate_grad_hooks or {}) for name, p in model.named_parameters()}
    state = {name: value.tolist() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    everything = snapshot(model)
    if model.training:  # a norm's buffers were written twice, then
        everything["buffers"] = None
    return grads, flags, hooks, state, modes, torch.get_rng_state().tolist(), torch.is_grad_enabled(), everything


class Stop(Exception):
    pass


def failing(after: int) -> Callable[[Tensor], Tensor]:
    """A loss that fails when it is called the `after`-th time."""
    calls: list[int] = []

    def loss(output: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == after:
            raise Stop
        return square(output)

    return loss
