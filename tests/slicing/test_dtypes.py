"""Other dtypes and memory layouts than the contiguous float64 of the case table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memsave.slicing.rules.resampling import nearest_taps
from tests.slicing.harness import Subject, check, lively
from tests.slicing.modules import ConvNeXtBlock, LayerNorm2d, MixFFN, SqueezeExcitation, f
from tests.slicing.test_rules import CASES, C, Case, sandwich

LAYERS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(4, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Conv2d(8, 4, 5, padding=2),
        nn.BatchNorm2d(4),
    ),
    "pools": lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
    "up": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConvTranspose2d(4, 4, 4, 2, 1)),
    "nearest": lambda: nn.Sequential(f(lambda x: F.interpolate(x, size=(29, 23))), nn.Conv2d(4, 4, 3)),
    "batch norm alone": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.SiLU()),
    "group norm": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3)),
    "channels last": lambda: nn.Sequential(ConvNeXtBlock(4), LayerNorm2d(4)),
    "squeeze and excitation": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), SqueezeExcitation(4)),
    "reduces": lambda: f(lambda x: (x.mean((2, 3)), x.sum((2, 3)), x.amax((2, 3)), x.norm(dim=(2, 3)), x.std((2, 3)))),
    "mixes dtypes": lambda: f(lambda x: (x.float().relu() * 2).to(x.dtype) + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_dtypes(layers: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    subject = Subject.of(lively(LAYERS[layers]()).to(dtype), torch.randn(2, 4, 13, 11).to(dtype))
    for channels_last in (False, True):
        check(subject, (0,), rows=(1, 3), channels_last=channels_last)
        check(subject, (0, 1), tiles=[(3, 2)], channels_last=channels_last)


@pytest.mark.parametrize("layers", LAYERS)
def test_inputs_in_channels_last(layers: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 13, 11).contiguous(memory_format=torch.channels_last)
    subject = Subject.of(lively(LAYERS[layers]()).to(memory_format=torch.channels_last), x)
    for channels_last in (False, True):
        check(subject, (1,), rows=(1, 4), channels_last=channels_last)
        check(subject, (0, 1), tiles=[(3, 2)], channels_last=channels_last)


def test_tokens_in_float32() -> None:
    subject = Subject.of(lively(MixFFN(4)), torch.randn(2, 4, 9, 7))
    check(subject, (0,), rows=(1, 2, 5))


FLAT = [case for case in CASES if len(case.size) == 2 and case.between][::3]


@pytest.mark.parametrize("case", FLAT, ids=[case.name for case in FLAT])
def test_rules_with_weights_in_channels_last(case: Case) -> None:
    module = lively(sandwich(case, case.module().double().eval()).double())
    subject = Subject.of(module, torch.randn(2, C, *case.size, dtype=torch.float64))
    check(subject, case.sliceable[-1:], rows=(2, 5), channels_last=True)
    check(subject, case.sliceable, tiles=[(3, 2)[: len(case.sliceable)]], channels_last=True)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_nearest_rounds_as_torch_does(mode: str, dtype: torch.dtype, channels_last: bool) -> None:
    """The nearest row flips with the last bit of the scale, which depends on dtype and size."""
    form = torch.channels_last if channels_last else torch.contiguous_format
    for size_in in range(2, 50):
        x = torch.arange(size_in, dtype=dtype).view(1, 1, -1, 1).repeat(2, 3, 1, 5).contiguous(memory_format=form)
        for size_out in range(2, 150):
            rows = nearest_taps(mode, size_in, size_out, None, dtype, (7,)).rows[:, 0]
            shown = F.interpolate(x, size=(size_out, 7), mode=mode)
            assert torch.equal(shown[1, 2, :, 3].long(), rows), (size_in, size_out)
        for factor in (0.6, 1.1, 2.04, 3.0, 4.99):
            size_out = int(size_in * factor)
            rows = nearest_taps(mode, size_in, size_out, factor, dtype, (int(5 * factor),)).rows[:, 0]
            shown = F.interpolate(x, scale_factor=factor, mode=mode)
            assert torch.equal(shown[0, 0, :, 0].long(), rows), (size_in, factor)
