"""What takes several runs over the parts, or more than one input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.harness import ROWS, Subject, check, lively
from tests.slicing.modules import Lambda, SqueezeExcitation


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (deviation + 1e-5), self.bias, padding=1)


class Regates(nn.Module):
    """A gate that a later pass reads again, after an op that could overwrite it has run."""

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True).sigmoid()
        y = x * gate
        return y * (gate + y.amax((2, 3), keepdim=True)).relu()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Any]:
        up = F.interpolate(self.coarse(y), size=x.shape[2:], mode="bilinear")
        joined = torch.cat([up, self.fine(x)], 1)
        return {"joined": joined * scale, "pooled": joined.mean((2, 3)), "scale": scale}


def three_passes() -> nn.Module:
    return nn.Sequential(
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv2d(4, 4, 3, 2, 1),
        nn.BatchNorm2d(4),
        SqueezeExcitation(4),
        nn.GroupNorm(1, 4),
    )


TWICE = {
    "standardized": lambda: nn.Sequential(StandardizedConv(4, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()),
    "standardized, batch norm": lambda: nn.Sequential(StandardizedConv(4, 4, 3), nn.BatchNorm2d(4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "gate read again": Regates,
    "three passes": three_passes,
    "batch norm in two passes": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), SqueezeExcitation(4)
    ),
    "gathered beside a convolution": lambda: Lambda(
        lambda m, x: (lambda y: (m.b(y), y.mean((2, 3)), y.std((2, 3))))(m.a(x)),
        a=nn.Conv2d(4, 4, 3),
        b=nn.Conv2d(4, 4, 5),
    ),
    "same layer twice": lambda: (lambda layer: nn.Sequential(layer, nn.ReLU(), layer))(nn.Conv2d(4, 4, 3, padding=1)),
    "spatial gates": lambda: Lambda(
        lambda m, x: x * m.conv(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
        conv=nn.Conv2d(2, 1, 7, padding=3),
    ),
}


@pytest.mark.parametrize("make", TWICE.values(), ids=TWICE)
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_read_in_several_passes(make: Callable[[], nn.Module], channels_last: bool) -> None:
    torch.manual_seed(0)
    subject = Subject.of(lively(make().double()), torch.randn(2, 4, 13, 10, dtype=torch.float64))
    check(subject, (0,), rows=ROWS, channels_last=channels_last)
    check(subject, (0, 1), tiles=[(2, 2), (3, 4)], channels_last=channels_last)


def test_two_maps_of_different_sizes() -> None:
    module = lively(TwoInputs().double())
    x, y = torch.randn(1, 4, 17, 14, dtype=torch.float64), torch.randn(1, 3, 6, 5, dtype=torch.float64)
    subject = Subject.of(module, x, y)
    for axis in (0, 1):
        check(subject, (axis,), rows=ROWS)
    check(subject, (0, 1), tiles=[(2, 2), (5, 3)])
