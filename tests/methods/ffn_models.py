"""A model with one feed-forward block, and a short way to route it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import RoutedFFNConfig

from ..nn.routed_ffn.toys import WIDTH, dense, tokens

clusterings = pytest.mark.parametrize("clustering", ["contiguous", "coactivation"])


def config(**settings: Any) -> RoutedFFNConfig:
    return RoutedFFNConfig(**{"target_modules": ["ffn"], **settings})


class Model(nn.Module):
    def __init__(self, kind: str = "gated", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.ffn: Any = dense(kind, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm(x))


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [tokens(5, 7, dtype=dtype, seed=seed).detach() for seed in range(3)]


def converted(kind: str = "gated", dtype: torch.dtype = torch.float32, **settings: Any) -> Model:
    model = Model(kind, dtype)
    made = config(**settings)
    memsave.convert_model(model, made, calibration=batches(dtype) if made.calibrated else None)
    return model
