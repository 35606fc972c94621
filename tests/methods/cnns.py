"""Small convolutional networks whose values a plan could get wrong, and pairs of one as it is and one that is planned.

x is (B, 3, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from memsave import PatchConvConfig

from ..slicing.harness import lively

SIZE = (1, 3, 40, 40)
SCHEDULES = ("stream", "patch")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2}


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class SqueezeExcite(nn.Module):
    """Scales channels by a function of their means over the whole map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = ConvBlock(channels, 2 * channels), ConvBlock(2 * channels, channels)
        self.excite = SqueezeExcite(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.excite(self.second(self.first(x)))


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.down = ConvBlock(3, 8), Residual(8), ConvBlock(8, 12, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.block(self.stem(x))).mean((2, 3))


class Classifier(nn.Module):
    """All its maps are made in `features`, which is planned."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = Features(), nn.Linear(12, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.features(x)) * scale


class Flat(nn.Module):
    """Its own forward has the maps: it is planned itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvBlock(3, 8), ConvBlock(8, 8, 2)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x))).mean((2, 3))


def convert(model: nn.Module, schedule: str = "stream", **settings: Any) -> memsave.Report:
    """In four bands, or 3 x 3 tiles: so small that none would pay."""
    parts = 4 if schedule == "stream" else 3
    settings = {"input_size": SIZE, "num_patches": parts, **settings}
    return memsave.convert_model(model, PatchConvConfig(schedule=schedule, **settings))


@cache
def _pair(make: Callable[[], nn.Module], schedule: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = lively(make()).to(dtype)
    planned = copy.deepcopy(plain)
    convert(planned, schedule)
    return plain, planned


def pair(
    make: Callable[[], nn.Module] = Classifier, schedule: str = "stream", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A model as it is and its planned twin: fresh copies."""
    plain, planned = _pair(make, schedule, dtype)
    return copy.deepcopy(plain), copy.deepcopy(planned)


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape or SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    largest = expected.abs().max().item()
    assert largest > 1e-3, "what is compared has vanished"
    difference = (found.double() - expected.double()).abs().max().item()
    assert difference == difference, "NaN"
    return difference / largest


def assert_same(planned: nn.Module, plain: nn.Module, x: Tensor | None = None) -> None:
    """Both give the same for `x`, without gradients."""
    x = image() if x is None else x
    expected = run(plain, x)
    assert error(run(planned, x), expected) <= TOLERANCE[expected.dtype]


def counts(model: nn.Module) -> dict[str, int]:
    """How many calls ran by a plan ("planned"), and why others did not; all plans of a model count together."""
    return dict(memsave.patch_plans(model)[0].calls)
