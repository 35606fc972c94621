"""Maps of three spatial dimensions, (B, C, T, H, W), in parts along time, height, and all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.slicing.harness import Subject, assert_close, check, check_both_schedules, check_macs, lively
from tests.slicing.modules import Residual, f

aten = torch.ops.aten


class ByFrames(nn.Module):
    """Layers for images, on each frame: time goes into the batch and back."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, time, height, width = x.shape
        y = self.layers(x.permute(0, 2, 1, 3, 4).reshape(batch * time, channels, height, width))
        return y.reshape(batch, time, *y.shape[1:]).permute(0, 2, 1, 3, 4)


class ByPixels(nn.Module):
    """A layer along time, on each pixel: height and width go into the batch and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, time, height, width = x.shape
        y = self.layer(x.permute(0, 3, 4, 1, 2).reshape(batch * height * width, channels, time))
        return y.reshape(batch, height, width, -1, time).permute(0, 3, 4, 1, 2)


def temporal_block() -> nn.Module:
    return Residual(
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.Conv3d(4, 4, (3, 3, 3), padding=1),
    )


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv3d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, 2, 3, stride=(1, 2, 2))
    ),
    "residual": temporal_block,
    "strided in time": lambda: nn.Sequential(nn.Conv3d(4, 4, 3, 2, 1), nn.BatchNorm3d(4), nn.Hardswish()),
    "R(2+1)D": lambda: nn.Sequential(
        nn.Conv3d(4, 5, (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(5),
        nn.ReLU(),
        nn.Conv3d(5, 4, (3, 1, 1), padding=(1, 0, 0)),
    ),
    "pools": lambda: nn.Sequential(
        nn.AvgPool3d(2, 1, 1, count_include_pad=False), nn.Conv3d(4, 4, 1), nn.MaxPool3d(3, 2, 1)
    ),
    "up": lambda: nn.Sequential(nn.ConvTranspose3d(4, 4, 4, 2, 1), nn.Conv3d(4, 2, 3, padding=1)),
    "trilinear": lambda: nn.Sequential(
        f(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")), nn.Conv3d(4, 2, 3)
    ),
    "nearest": lambda: nn.Sequential(f(lambda x: F.interpolate(x, scale_factor=(1, 2, 2))), nn.Conv3d(4, 2, 3)),
    "causal": lambda: nn.Sequential(f(lambda x: F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate")), nn.Conv3d(4, 4, 3)),
    "causal zeros": lambda: nn.Sequential(f(lambda x: F.pad(x, (1, 1, 1, 1, 2, 0))), nn.Conv3d(4, 4, 3)),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("batch", [1, 2])
def test_blocks(make: Callable[[], nn.Module], batch: int) -> None:
    torch.manual_seed(0)
    subject = Subject.of(lively(make().double()), torch.randn(batch, 4, 7, 6, 5, dtype=torch.float64))
    check_both_schedules(subject, (0, 1, 2))
    check(subject, (0, 2), tiles=[(3, 2)])
    check_macs(subject, subject.stretch((1,), rows=2))


FRAMES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: ByFrames(nn.Conv2d(4, 5, 3, padding=1, stride=2), nn.ReLU()),
    "norms": lambda: ByFrames(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    "sampling": lambda: ByFrames(
        nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 4, 2, 2), nn.AvgPool2d(3, 2, 1)
    ),
    "shuffles": lambda: ByFrames(nn.PixelShuffle(2), nn.Conv2d(1, 4, 3, padding=1), nn.PixelUnshuffle(2)),
    "between": lambda: nn.Sequential(temporal_block(), ByFrames(nn.Conv2d(4, 4, 3, padding=1)), temporal_block()),
}


@pytest.mark.parametrize("make", FRAMES.values(), ids=FRAMES)
def test_layers_for_images(make: Callable[[], nn.Module]) -> None:
    """Along height always; along time while each video stands alone in the batch."""
    torch.manual_seed(0)
    module = lively(make().double())
    one = Subject.of(module, torch.randn(1, 4, 5, 8, 6, dtype=torch.float64))
    check(one, (0,), rows=(1, 2, 3))
    if make is not FRAMES["norms"]:  # moments of an example are either sliced with it or gathered
        check(one, (0, 1), tiles=[(2, 2)])
    check(one, (1,), rows=(1, 2, 3, 5))
    check(one, (1, 2), tiles=[(2, 3)])
    two = Subject.of(module, torch.randn(2, 4, 5, 8, 6, dtype=torch.float64))
    check(two, (1,), rows=(1, 2, 3, 5))
    reasons = two.rules((0,)).reasons
    assert any("tears the rows apart" in reason for reason in reasons.values())
    assert_close(two.run(two.stretch((0,), rows=2)), two.expected(), "the stretch before it")


def test_layers_along_time() -> None:
    """Height is the first part of the batch, then, and can be sliced for one video."""
    module = lively(nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), ByPixels(nn.Conv1d(4, 3, 3, padding=1))).double())
    subject = Subject.of(module, torch.randn(1, 4, 5, 6, 7, dtype=torch.float64))
    check(subject, (0,), rows=(1, 2, 3))
    check(subject, (1,), rows=(1, 2, 5))
    check(subject, (0, 1), tiles=[(2, 3)])
    check_macs(subject, subject.stretch((1,), rows=2))
