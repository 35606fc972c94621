"""Networks drawn at random, in every schedule: the same as the module, to the rounding of float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.slicing.harness import Subject, assert_close, lively
from tests.slicing.modules import ConvNeXtBlock, Lambda, LayerNorm2d, MixFFN, Residual, SqueezeExcitation, f, shuffle

# More of them, other ones in each run, by hand: MEMSAVE_RANDOM_NETWORKS=500.
MORE = int(os.environ.get("MEMSAVE_RANDOM_NETWORKS", "0"))
network_settings = settings(
    max_examples=MORE or 40,
    deadline=None,
    derandomize=not MORE,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
Size = tuple[int, int]
Drawn = tuple[nn.Module, int, Size]  # a module, its channels and its size


def after(module: nn.Module, channels: int, size: Size) -> Drawn:
    """What comes out for a map of this size, and the module."""
    with torch.no_grad():
        shape = module.double().eval()(torch.zeros(1, channels, *size, dtype=torch.float64)).shape
    return module, int(shape[1]), (int(shape[2]), int(shape[3]))


def convolution(draw: Callable[..., Any], channels: int, size: Size, same: bool = False) -> nn.Module:
    kernel = [draw(st.integers(1, min(7, n))) for n in size]
    dilation = [draw(st.integers(1, 3)) if k > 1 and 3 * k <= n else 1 for k, n in zip(kernel, size, strict=True)]
    out = channels if same else draw(st.sampled_from([2, 4, 6]))
    groups = draw(st.sampled_from([1, 2] if out % 2 == channels % 2 == 0 else [1]))
    if same:
        return nn.Conv2d(channels, out, kernel, padding="same", dilation=dilation, groups=groups)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
    padding = [draw(st.integers(0, s if mode == "zeros" else min(s, n - 1))) for s, n in zip(spans, size, strict=True)]
    padding = [max(p, -(-(s + 1 - n) // 2), 0) for p, s, n in zip(padding, spans, size, strict=True)]
    stride = [draw(st.integers(1, 3)) for _ in size]
    bias = draw(st.booleans())
    layer = nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, bias, mode)
    return nn.Sequential(layer, nn.BatchNorm2d(out)) if draw(st.booleans()) else layer


def transposed(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    kernel, stride = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, (kernel - 1) // 2))
    further = draw(st.integers(0, stride - 1))
    return nn.ConvTranspose2d(channels, 4, kernel, stride, padding, further, bias=draw(st.booleans()))


def pool(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    kernel = draw(st.integers(1, min(4, *size)))
    stride, padding, ceil = draw(st.integers(1, 3)), draw(st.integers(0, kernel // 2)), draw(st.booleans())
    if draw(st.booleans()):
        return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil)
    return nn.AvgPool2d(kernel, stride, padding, ceil_mode=ceil, count_include_pad=draw(st.booleans()))


def resampling(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    mode = draw(st.sampled_from(["nearest", "nearest-exact", "bilinear", "bicubic"]))
    corners = draw(st.booleans()) if mode.startswith("bi") else None
    if draw(st.booleans()):
        target = [draw(st.integers(1, 2 * n)) for n in size]
        return f(lambda x: F.interpolate(x, target, mode=mode, align_corners=corners))
    factor = draw(st.sampled_from([2.0, 1.5, 3.0, 0.7, 1.0 / 3]))
    return f(lambda x: F.interpolate(x, scale_factor=max(factor, 1 / min(size)), mode=mode, align_corners=corners))


def moving(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    pads = [draw(st.integers(-min(1, (n - 1) // 2), 3)) for n in (size[1], size[1], size[0], size[0])]
    choices = [
        f(lambda x: F.pad(x, pads, value=0.5)),
        f(lambda x: F.pad(x, [max(0, min(p, min(size) - 1)) for p in pads], mode="reflect")),
        f(lambda x: x[:, :, :: 1 + abs(pads[0]), pads[1] % size[1] :]),
        f(lambda x: torch.cat([x, x.relu()], 1)[:, 1:]),
        f(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    ]
    if channels % 2 == 0:
        choices += [f(lambda x: shuffle(x, 2)), nn.ChannelShuffle(2)]
    if channels % 4 == 0:
        choices.append(nn.PixelShuffle(2))
    if size[0] % 2 == size[1] % 2 == 0:
        choices.append(nn.PixelUnshuffle(2))
    return draw(st.sampled_from(choices))


def pointwise(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    names = ["ReLU", "ReLU6", "Hardswish", "SiLU", "GELU", "PReLU", "Sigmoid"]
    place = Lambda(lambda m, x: x * m.place, place=torch.rand(channels, *size))
    return draw(st.sampled_from([*(getattr(nn, name)() for name in names), f(lambda x: x * x.tanh()), place]))


def norm(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    choices = [nn.BatchNorm2d(channels), LayerNorm2d(channels), ConvNeXtBlock(channels)]
    if min(size) > 1:
        choices += [nn.GroupNorm(1, channels), nn.InstanceNorm2d(channels)]
    return draw(st.sampled_from(choices))


def gate(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    if min(size) == 1:  # what has one row is no map to slice
        return nn.Identity()
    choices = [
        SqueezeExcitation(channels),
        f(lambda x: x + x.amax((2, 3), keepdim=True)),
        f(lambda x: x - x.mean((2, 3), True).expand_as(x)),
        f(lambda x: x / x.norm(dim=(2, 3), keepdim=True).clamp_min(0.1)),
    ]
    return draw(st.sampled_from(choices))


def branches(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    one = nn.Sequential(convolution(draw, channels, size, same=True), pointwise(draw, channels, size))
    two = convolution(draw, channels, size, same=True)
    kind = draw(st.sampled_from(["residual", "sum", "cat", "product"]))
    if kind == "residual":
        return Residual(one, two)
    joined = {"sum": torch.add, "product": torch.mul, "cat": lambda a, b: torch.cat([a, b], 1)}[kind]
    return Lambda(lambda m, x: joined(m.one(x), m.two(x)), one=one, two=two)


def encoder_and_decoder(draw: Callable[..., Any], channels: int, size: Size) -> nn.Module:
    """Down, a few layers, up to the size from which it came, and a skip around all of it."""
    if min(size) < 6:
        return nn.Identity()
    down, low, small = after(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)])), channels, size)
    inner, low, _ = after(nn.Sequential(convolution(draw, low, small, same=True), gate(draw, low, small)), low, small)
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic"]))
    return Lambda(
        lambda m, x: torch.cat([x, F.interpolate(m.inner(m.down(x)), size=x.shape[2:], mode=mode)], 1),
        down=down,
        inner=inner,
    )


LAYERS = [convolution, convolution, transposed, pool, resampling, moving, pointwise, norm, gate, branches]
LAYERS.append(encoder_and_decoder)


@st.composite
def networks(draw: Callable[..., Any], smallest: int = 7, largest: int = 97) -> tuple[nn.Module, Size, Drawn]:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    first = size = (draw(st.integers(smallest, largest)), draw(st.integers(smallest, 29)))
    channels, layers = 2, []
    for _ in range(draw(st.integers(1, 7))):
        layer = draw(st.sampled_from(LAYERS))(draw, channels, size)
        layer, channels, after_it = after(layer, channels, size)
        if min(after_it) < 1 or max(after_it) > 150 or channels > 24:
            break
        layers.append(layer)
        size = after_it
    return nn.Sequential(*layers), first, (nn.Identity(), channels, size)


def check_schedules(draw: Callable[..., Any], subject: Subject) -> None:
    expected = subject.expected()
    for axes in ((0,), (1,), (0, 1)):
        rows = draw(st.sampled_from([1, 2, 3, 4, 7, 11]))
        tiles = (draw(st.integers(1, 6)), draw(st.integers(1, 5)))[: len(axes)]
        start, stop = subject.longest(axes)
        if start == stop:
            continue
        stretches = [subject.stretch(axes, tiles=tiles)]
        stretches += [subject.stretch(axes, rows=rows)] * (len(axes) == 1)
        for stretch in stretches:
            found = subject.run(stretch, channels_last=draw(st.booleans()))
            assert_close(found, expected, f"axes {axes}, rows {stretch.rows}, tiles {stretch.tiles}")


@network_settings
@given(networks(), st.data())
def test_any_network(drawn: Any, data: st.DataObject) -> None:
    network, size, (_, channels, last) = drawn
    batch = data.draw(st.sampled_from([1, 3]))
    subject = Subject.of(lively(network.double()), torch.randn(batch, 2, *size, dtype=torch.float64))
    if min(last) > 1:
        reason = subject.covers_all((0,))
        assert not reason, reason
    check_schedules(data.draw, subject)


@settings(network_settings, max_examples=MORE // 5 or 5)
@given(st.integers(5, 17), st.integers(5, 17), st.data())
def test_tokens(height: int, width: int, data: st.DataObject) -> None:
    layers = [
        MixFFN(4) if data.draw(st.booleans()) else convolution(data.draw, 4, (height, width), same=True)
        for _ in range(3)
    ]
    subject = Subject.of(lively(nn.Sequential(*layers).double()), torch.randn(2, 4, height, width, dtype=torch.float64))
    for rows in (1, data.draw(st.integers(1, 9))):
        assert_close(subject.run(subject.stretch((0,), rows=rows)), subject.expected(), f"rows {rows}")
