"""A small model with the names that transformers have, and a short way to aim WTA-CRS at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from memsave import WTACRSConfig

Unchanged = Callable[[nn.Module], nn.Module]
"""The fixture `unchanged`: remembers a model, which at the end of the test must be as it was."""


class MLP(nn.Module):
    """down(act(up(x))), with the names that transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(4, 8)
        self.act = nn.SiLU()
        self.down_proj = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


def make() -> Any:
    """0: a norm, 1 and 2: MLPs."""
    return nn.Sequential(nn.LayerNorm(4), MLP(), MLP())


def wta(targets: Any = r".*", **settings: Any) -> WTACRSConfig:
    return WTACRSConfig(target_modules=targets, **settings)
