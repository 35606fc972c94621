"""What a converted module returns may be modified in place, as what the plain one returns may be."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import memsave


class Overwriting(nn.Module):
    """Zeros the first row of what a module gives for a norm's output, as models do with padding."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(self.norm(x))
        y[0] = 0
        return y


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


@pytest.mark.parametrize("shape", [(6, 8), (2, 5, 8), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize(
    ("make", "configs"),
    [
        (lambda: nn.Linear(8, 8), None),
        (lambda: nn.Linear(8, 8, bias=False), None),
        (block, None),
        (block, [memsave.RecomputeNormConfig(), memsave.RecomputeMLPConfig(recompute="all")]),
        (lambda: nn.Linear(8, 8), memsave.WTACRSConfig(keep_ratio=1.0, target_modules=["module"])),
    ],
    ids=["linear", "no bias", "mlp", "mlp, all", "wta_crs"],
)
def test_outputs_may_be_modified_in_place(
    make: Callable[[], nn.Module], configs: object, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(Overwriting(make()))
    model = copy.deepcopy(plain)
    memsave.convert_model(model, configs)  # type: ignore[arg-type]
    x = torch.randn(shape)
    for each in (plain, model):
        each(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
