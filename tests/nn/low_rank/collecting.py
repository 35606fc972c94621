"""Small models whose linears' inputs are collected, their batches, and all that must stay as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memsave.nn.low_rank.moments import second_moments

from ...snapshot import snapshot

FEATURES = 6


class Attention(nn.Module):
    """q, k and v read one tensor; gate and up another; out and down each its own; counts the calls."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(FEATURES, 4) for _ in range(3))
        self.out = nn.Linear(4, FEATURES)
        self.gate, self.up = (nn.Linear(FEATURES, 10) for _ in range(2))
        self.down = nn.Linear(10, FEATURES)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(FEATURES)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        x = self.dropout(self.norm(x.flatten(0, -2)).reshape(x.shape)) * scale
        y = self.out(self.q(x) * self.k(x).sigmoid() + self.v(input=x))
        return self.down(self.gate(y).tanh() * self.up(y))


NAMES = ("down", "q", "k", "gate", "v", "up", "out")
GROUPS = [("down",), ("q", "k", "v"), ("gate", "up"), ("out",)]


def attention(dtype: torch.dtype = torch.float64, **settings: Any) -> Attention:
    torch.manual_seed(0)
    model = Attention(**settings).to(dtype)
    model.k.eval()  # modes differ
    return model


def data(count: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 5, FEATURES, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def part(model: nn.Module, names: tuple[str, ...] = NAMES) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in names}


def collected(model: nn.Module, *args: Any, **kwargs: Any) -> dict[tuple[str, ...], Tensor]:
    found: dict[tuple[str, ...], Tensor] = {}

    def use(names: tuple[str, ...], moment: Tensor) -> None:
        assert names not in found
        found[names] = moment

    second_moments(model, *args, use, **kwargs)
    return found


def by_hand(model: nn.Module, batches: list[Any], names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    """x^T x in float64 of each module on its own."""
    sums: dict[str, Tensor] = {}

    def hook(name: str, x: Tensor) -> None:
        flat = x.detach().double().reshape(-1, x.shape[-1])
        sums[name] = sums.get(name, 0) + flat.mT @ flat

    modes = {module: module.training for module in model.modules()}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: hook(name, *args, *kwargs.values()), with_kwargs=True
        )
        for name in names
    ]
    model.eval()
    for batch in batches:
        model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    for module, mode in modes.items():
        module.training = mode
    return sums


def surroundings(model: nn.Module) -> Any:
    return snapshot(model), torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Calls(nn.Module):
    """Calls its linears by a function of them and the input."""

    def __init__(self, body: Callable[[nn.Linear, nn.Linear, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.body = body

    def forward(self, x: Tensor) -> None:
        self.body(self.a, self.b, x)


class Experts(nn.Module):
    """The first batches reach no expert, or one only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)
        self.runs: list[int] = []

    def forward(self, x: Tensor) -> None:
        self.runs.append(len(x))
        for expert, rows in ((self.a, x[:, 0] > 0), (self.b, x[:, 0] < 0)):
            if bool(rows.any()):
                expert(x[rows])
