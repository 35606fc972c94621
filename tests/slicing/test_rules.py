"""Every op and every special parameter of it, part by part: in all bands and tilings as in the module itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.slicing.rules.statistics import channel_moments, scale_channels
from tests.slicing.harness import Subject, check_both_schedules, check_macs, lively
from tests.slicing.modules import (
    ConvNeXtBlock,
    Lambda,
    LayerNorm2d,
    MixFFN,
    Residual,
    SqueezeExcitation,
    f,
    shuffle,
)

aten = torch.ops.aten
C = 4


class Case(NamedTuple):
    """An op on a map of C channels.

    Attributes:
        op: what must have been computed part by part.
        size: of the spatial dimensions.
        axes: those that can be sliced; None for all.
        between: whether the op also works between two convolutions.
    """

    name: str
    make: Callable[[], nn.Module]
    op: Any
    size: tuple[int, ...] = (11, 13)
    between: bool = True
    axes: tuple[int, ...] | None = None

    @property
    def sliceable(self) -> tuple[int, ...]:
        return tuple(range(len(self.size))) if self.axes is None else self.axes

    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()


def conv(name: str, *args: Any, dims: int = 2, size: tuple[int, ...] = (11, 13, 9), **kwargs: Any) -> Case:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    op = (aten.conv1d, aten.conv2d, aten.conv3d)[dims - 1]
    return Case(f"conv{dims}d {name}", lambda: layer(C, *args, **kwargs), op, size[:dims])


def transposed(name: str, *args: Any, dims: int = 2, size: tuple[int, ...] = (7, 6, 5), **kwargs: Any) -> Case:
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    op = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)[dims - 1]
    return Case(f"transposed{dims}d {name}", lambda: layer(C, *args, **kwargs), op, size[:dims])


def fn(name: str, function: Callable[[Tensor], Any], op: Any, size: tuple[int, ...] = (11, 13), between: bool = True):
    return Case(name, lambda: f(function), op, size, between)


def padded_conv(name: str, pads: tuple[int, ...], *args: Any, **kwargs: Any) -> Case:
    return Case(
        f"conv2d behind F.pad {name}",
        lambda: nn.Sequential(f(lambda x: F.pad(x, pads)), nn.Conv2d(C, *args, **kwargs)),
        aten.conv2d,
    )


def up(mode: str, op: Any, of: tuple[int, ...] = (7, 6), **kwargs: Any) -> Case:
    named = " ".join(f"{k}={v}" for k, v in kwargs.items())
    return fn(f"interpolate {mode} {named}", lambda x: F.interpolate(x, mode=mode, **kwargs), op, of)


KERNELS_AND_STRIDES = [
    (1, 1),
    (1, 2),
    (1, 3),
    (2, 1),
    (2, 2),
    (2, 3),
    (3, 1),
    (3, 2),
    (3, 3),
    (4, 2),
    (5, 1),
    (6, 3),
    (7, 2),
]
CONVOLUTIONS = [
    *(conv(f"kernel {k} stride {s}", 3, k, stride=s, padding=k // 2) for k, s in KERNELS_AND_STRIDES),
    *(conv(f"kernel {k} unpadded", 3, k) for k in (2, 3)),
    conv("kernel (3, 5) stride (2, 1)", 3, (3, 5), stride=(2, 1), padding=(0, 2)),
    conv("most padding", 3, 5, padding=4),
    conv("grouped", 6, 3, padding=1, groups=2),
    conv("depthwise without bias", 2 * C, 3, padding=1, groups=C, bias=False),
    conv("dilated", 3, 3, padding=2, dilation=2),
    conv("dilated, strided", 3, 3, padding=3, dilation=3, stride=2),
    conv("same", 3, 5, padding="same"),
    conv("same, even", 3, 4, padding="same", dilation=(1, 3)),
    conv("valid", 3, 3, padding="valid"),
    conv("reflect", 3, 5, padding=2, padding_mode="reflect"),
    conv("replicate", 3, 5, padding=2, padding_mode="replicate", stride=2),
    conv("circular", 3, 3, padding=1, padding_mode="circular"),
    conv("reflect, same", 3, 4, padding="same", padding_mode="reflect"),
    conv("line", 3, 5, padding=2, stride=2, dims=1, size=(29,)),
    conv("line same", 3, 4, padding="same", dims=1, size=(29,)),
    conv("video", 3, 3, padding=1, stride=(1, 2, 2), dims=3, size=(5, 7, 6)),
    conv("video in time", 3, (3, 1, 1), padding=(1, 0, 0), dims=3, size=(5, 4, 3)),
    padded_conv("as TensorFlow does", (0, 1, 0, 1), 3, 3, stride=2),
    padded_conv("uneven and more", (2, 1, 0, 3), 3, 5, padding=1),
    padded_conv("wider than the kernel", (1, 1, 2, 2), 3, 1),
    padded_conv("by a value", (1, 1, 1, 1), 3, 3),
    Case(
        "conv2d behind F.pad by 2.5", lambda: nn.Sequential(nn.ConstantPad2d(1, 2.5), nn.Conv2d(C, 3, 3)), aten.conv2d
    ),
]
TRANSPOSED = [
    transposed("kernel 2 stride 2", 3, 2, stride=2),
    transposed("kernel 3 stride 2", 3, 3, stride=2, padding=1, output_padding=1),
    transposed("kernel 4 stride 2 without bias", 3, 4, stride=2, padding=1, bias=False),
    transposed("kernel 3 stride 1", 3, 3, padding=1),
    transposed("kernel 5 stride 3 grouped", 6, 5, stride=3, padding=2, output_padding=2, groups=2),
    transposed("dilated", 3, 3, stride=2, dilation=2, padding=1, output_padding=1),
    transposed("kernel below stride", 3, 2, stride=3),
    transposed("kernel 1 stride 3", 3, 1, stride=3, output_padding=2),
    transposed("depthwise", C, 4, stride=2, padding=1, groups=C),
    transposed("most padding", 3, 5, padding=4),
    transposed("uneven", 3, (3, 2), stride=(1, 2), padding=(1, 0), output_padding=(0, 1)),
    transposed("line", 3, 4, stride=2, padding=1, dims=1),
    transposed("video", 3, (3, 4, 4), stride=(1, 2, 2), padding=1, dims=3, size=(4, 3, 3)),
]
POOLS = [
    Case("max pool", lambda: nn.MaxPool2d(2), aten.max_pool2d),
    Case("max pool 3 stride 2", lambda: nn.MaxPool2d(3, 2, 1), aten.max_pool2d),
    Case("max pool ceil", lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True), aten.max_pool2d, (12, 14)),
    Case("max pool ceil 2", lambda: nn.MaxPool2d(2, 2, ceil_mode=True), aten.max_pool2d),
    Case("max pool ceil 3", lambda: nn.MaxPool2d(2, 3, 1, ceil_mode=True), aten.max_pool2d, (12, 13)),
    Case("max pool dilated", lambda: nn.MaxPool2d(3, 1, 1, dilation=2), aten.max_pool2d),
    Case("max pool below stride", lambda: nn.MaxPool2d(2, 3), aten.max_pool2d),
    Case("max pool spp", lambda: nn.MaxPool2d(5, 1, 2), aten.max_pool2d),
    Case("max pool uneven", lambda: nn.MaxPool2d((3, 2), (1, 2), (1, 0)), aten.max_pool2d),
    Case("max pool line", lambda: nn.MaxPool1d(3, 2, 1), aten.max_pool1d, (17,)),
    Case("max pool video", lambda: nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), aten.max_pool3d, (4, 7, 6)),
    Case("average pool", lambda: nn.AvgPool2d(2), aten.avg_pool2d),
    Case("average pool 3", lambda: nn.AvgPool2d(3, 1, 1), aten.avg_pool2d),
    Case("average pool without padding", lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), aten.avg_pool2d),
    Case("average pool ceil", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), aten.avg_pool2d, (12, 14)),
    Case("average pool ceil 2", lambda: nn.AvgPool2d(2, 2, ceil_mode=True), aten.avg_pool2d),
    Case("average pool ceil 3", lambda: nn.AvgPool2d(4, 3, 1, ceil_mode=True), aten.avg_pool2d, (12, 13)),
    Case(
        "average pool ceil without padding",
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        aten.avg_pool2d,
        (12, 14),
    ),
    Case("average pool divisor", lambda: nn.AvgPool2d(3, 2, 1, divisor_override=5), aten.avg_pool2d),
    Case("average pool line", lambda: nn.AvgPool1d(3, 2, 1), aten.avg_pool1d, (17,)),
    Case("average pool line ceil", lambda: nn.AvgPool1d(3, 2, 1, True, False), aten.avg_pool1d, (18,)),
    Case("average pool video", lambda: nn.AvgPool3d(2, (1, 2, 2), 1), aten.avg_pool3d, (4, 7, 6)),
]
RESAMPLING = [
    up("nearest", aten.upsample_nearest2d, scale_factor=2),
    up("nearest", aten.upsample_nearest2d, scale_factor=3.0),
    up("nearest", aten.upsample_nearest2d, scale_factor=1.7),
    up("nearest", aten.upsample_nearest2d, size=(10, 9)),
    up("nearest", aten.upsample_nearest2d, size=(3, 4)),
    up("nearest", aten.upsample_nearest2d, size=(14, 11)),
    up("nearest", aten.upsample_nearest2d, scale_factor=(2.09, 1.0)),
    up("nearest-exact", aten._upsample_nearest_exact2d, scale_factor=2),
    up("nearest-exact", aten._upsample_nearest_exact2d, scale_factor=1.7),
    up("nearest-exact", aten._upsample_nearest_exact2d, size=(4, 13)),
    *(
        up(mode, op, align_corners=corners, **kwargs)
        for mode, op in [("bilinear", aten.upsample_bilinear2d), ("bicubic", aten.upsample_bicubic2d)]
        for corners in (False, True)
        for kwargs in (
            {"scale_factor": 2},
            {"scale_factor": 1.7},
            {"size": (10, 17)},
            {"size": (3, 4)},
            {"scale_factor": (1.07, 0.6)},
            {"scale_factor": (1.0, 2.0)},
        )
    ),
    up("bilinear", aten._upsample_bilinear2d_aa, size=(3, 4), antialias=True),
    up("bilinear", aten._upsample_bilinear2d_aa, scale_factor=0.37, antialias=True),
    up("bicubic", aten._upsample_bicubic2d_aa, size=(3, 14), antialias=True),
    up("linear", aten.upsample_linear1d, (9,), scale_factor=2.3, align_corners=False),
    up("nearest", aten.upsample_nearest1d, (9,), scale_factor=2),
    up("trilinear", aten.upsample_trilinear3d, (3, 4, 5), scale_factor=2, align_corners=False),
    up("trilinear", aten.upsample_trilinear3d, (3, 4, 5), size=(5, 4, 3), align_corners=True),
    up("nearest", aten.upsample_nearest3d, (3, 4, 5), scale_factor=(1.0, 2.0, 2.0)),
]
NORMS = [
    Case("batch norm", lambda: nn.BatchNorm2d(C), aten.batch_norm),
    Case("batch norm without affine", lambda: nn.BatchNorm2d(C, affine=False, eps=1e-2), aten.batch_norm),
    Case("batch norm line", lambda: nn.BatchNorm1d(C), aten.batch_norm, (13,)),
    Case("batch norm video", lambda: nn.BatchNorm3d(C), aten.batch_norm, (3, 4, 5)),
    Case(
        "conv and batch norm",
        lambda: nn.Sequential(nn.Conv2d(C, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        aten.batch_norm,
    ),
    Case(
        "conv with bias and batch norm without affine",
        lambda: nn.Sequential(nn.Conv2d(C, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)),
        aten.batch_norm,
    ),
    Case(
        "conv read twice and batch norm",
        lambda: Lambda(
            lambda self, x: (lambda y: y + self.norm(y))(self.conv(x)), conv=nn.Conv2d(C, 5, 3), norm=nn.BatchNorm2d(5)
        ),
        aten.batch_norm,
    ),
    Case("group norm", lambda: nn.GroupNorm(2, C), channel_moments),
    Case("group norm without affine", lambda: nn.GroupNorm(1, C, affine=False), channel_moments),
    Case(
        "group norms",
        lambda: Residual(nn.GroupNorm(2, C), nn.SiLU(), nn.Conv2d(C, C, 3, 1, 1), nn.GroupNorm(4, C)),
        scale_channels,
    ),
    Case("group norm video", lambda: nn.GroupNorm(2, C), channel_moments, (3, 4, 5)),
    Case("instance norm", lambda: nn.InstanceNorm2d(C), channel_moments),
    Case("instance norm affine", lambda: nn.InstanceNorm2d(C, affine=True, eps=0.1), channel_moments),
    Case("ConvNeXt", lambda: ConvNeXtBlock(C), aten.layer_norm),
    Case("LayerNorm2d", lambda: LayerNorm2d(C), aten.mean),
    fn("variance over channels", lambda x: x / (x.var(1, keepdim=True, unbiased=False) + 1).sqrt(), aten.var),
    fn("norm over channels", lambda x: x / x.norm(dim=1, keepdim=True).clamp_min(1e-3), aten.linalg_vector_norm),
    fn("F.normalize", lambda x: F.normalize(x, dim=1), aten.linalg_vector_norm),
    fn("softmax over channels", lambda x: x.softmax(1), aten.softmax),
]
ELEMENTWISE = [
    *(
        Case(name, lambda name=name: getattr(nn, name)(), op)
        for name, op in [
            ("ReLU", aten.relu),
            ("ReLU6", aten.hardtanh),
            ("Hardswish", aten.hardswish),
            ("Hardsigmoid", aten.hardsigmoid),
            ("Hardtanh", aten.hardtanh),
            ("GELU", aten.gelu),
            ("SiLU", aten.silu),
            ("Mish", aten.mish),
            ("ELU", aten.elu),
            ("SELU", aten.selu),
            ("LeakyReLU", aten.leaky_relu),
            ("Softplus", aten.softplus),
            ("LogSigmoid", aten.log_sigmoid),
            ("PReLU", aten.prelu),
        ]
    ),
    Case("PReLU per channel", lambda: nn.PReLU(C), aten.prelu, (C, C)),
    Case("tanh GELU", lambda: nn.GELU("tanh"), aten.gelu),
    Case("hardtanh of its own", lambda: nn.Hardtanh(-0.3, 0.2), aten.hardtanh),
    fn("hardtanh by keyword", lambda x: aten.hardtanh(x, max_val=0.2), aten.hardtanh),
    Case("channel parameter", lambda: Lambda(lambda m, x: x * m.scale, scale=torch.rand(1, C, 1, 1)), aten.mul),
    Case("position parameter", lambda: Lambda(lambda m, x: x + m.place, place=torch.rand(1, C, 11, 13)), aten.add),
    Case("row parameter", lambda: Lambda(lambda m, x: x + m.place, place=torch.rand(11, 1)), aten.add, between=False),
    Case("column parameter", lambda: Lambda(lambda m, x: m.place - x, place=torch.rand(13)), aten.sub, between=False),
    Case(
        "position parameter, expanded",
        lambda: Lambda(
            lambda m, x: x + m.place.unsqueeze(0).expand(x.shape[0], -1, -1, -1), place=torch.rand(C, 11, 13)
        ),
        aten.add,
    ),
    fn("scalars", lambda x: 2 * x + 1 - x / 3, aten.add),
    fn("alpha", lambda x: torch.add(x, x.sigmoid(), alpha=3), aten.add),
    fn("square", lambda x: (x + 1) * (x + 1), aten.mul),
    fn("itself", lambda x: (lambda y: y * y)(x + 1), aten.mul),
    fn("itself later", lambda x: (lambda y: y.relu() + y)(x + 1), aten.add),
    fn("where", lambda x: torch.where(x > 0, x, 0.1 * x), aten.where),
    fn("masked fill", lambda x: x.masked_fill(x < 0, 0.5), aten.masked_fill),
    fn("clamp and pow", lambda x: x.clamp(-1, 1).pow(2), aten.pow),
    fn("to the same dtype", lambda x: F.relu(x.to(torch.float64)), aten.relu),
    fn("to another dtype", lambda x: F.relu((x.float() * 2).double()), aten.relu),
    fn("a view, then in place", lambda x: F.relu(x.permute(0, 1, 3, 2)).permute(0, 1, 3, 2), aten.permute),
    Case(
        "residual", lambda: Residual(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1)), aten.add
    ),
    fn("gate of the map", lambda x: x * x.sigmoid() + x.tanh() * 2, aten.mul),
]
MOVING = [
    Case(
        "concatenation",
        lambda: Lambda(
            lambda m, x: torch.cat([x, m.a(x), m.b(x)], 1),
            a=nn.Conv2d(C, 2, 3, padding=1),
            b=nn.Conv2d(C, 3, 5, padding=2),
        ),
        aten.cat,
    ),
    fn("concatenation with itself", lambda x: torch.cat([x, x], 1), aten.cat),
    Case("channel shuffle", lambda: nn.ChannelShuffle(2), aten.channel_shuffle),
    fn("channel shuffle by views", lambda x: shuffle(x, 2), aten.transpose),
    fn("zero pad", lambda x: F.pad(x, (2, 1, 3, 2)), aten.pad),
    fn("pad by a value", lambda x: F.pad(x, (2, 1, 0, 2), value=1.5), aten.pad),
    fn("wide pad", lambda x: F.pad(x, (7, 9, 8, 6), value=1.5), aten.pad),
    fn("negative pad", lambda x: F.pad(x, (-2, 1, 1, -3)), aten.pad),
    fn("crop", lambda x: F.pad(x, (-2, -1, -1, -3)), aten.pad),
    fn("pad channels", lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), aten.pad),
    *(
        fn(f"{mode} pad", lambda x, mode=mode: F.pad(x, (2, 1, 3, 2), mode=mode), aten.pad)
        for mode in ("reflect", "replicate", "circular")
    ),
    *(
        fn(f"{mode} pad, most", lambda x, mode=mode: F.pad(x, (4, 5, 4, 3), mode=mode), aten.pad, (5, 6))
        for mode in ("reflect", "replicate", "circular")
    ),
    fn("reflect pad of a line", lambda x: F.pad(x, (3, 2), mode="reflect"), aten.pad, (9,)),
    fn("replicate pad of a video", lambda x: F.pad(x, (1, 1, 2, 0, 2, 0), mode="replicate"), aten.pad, (3, 4, 5)),
    fn("pixel shuffle", lambda x: F.pixel_shuffle(x, 2), aten.pixel_shuffle, (5, 6)),
    fn("pixel unshuffle", lambda x: F.pixel_unshuffle(x, 2), aten.pixel_unshuffle, (6, 10)),
    Case("tokens", lambda: f(lambda x: x.flatten(2).transpose(1, 2) * 2), aten.flatten, (6, 5), False, (0,)),
    Case("MixFFN", lambda: MixFFN(C), aten.linear, axes=(0,)),
    fn("chunk", lambda x: (lambda a, b: a * b.sigmoid())(*x.chunk(2, 1)), aten.slice),
    fn("split", lambda x: (lambda a, b: torch.cat([b, a.relu()], 1))(*x.split([1, 3], 1)), aten.slice),
    fn("unbind", lambda x: (lambda p: p[0] + p[3])(x.unbind(1)).unsqueeze(1), aten.select),
    fn("glu", lambda x: F.glu(x, 1), aten.glu),
    fn("slice of rows", lambda x: x[:, :, 1:-1] * 2, aten.slice),
    fn("slice of rows and columns", lambda x: x[:, :, 3:, :-4], aten.slice),
    fn("every second", lambda x: x[:, :, ::2] + 1, aten.slice),
    fn("every third from the second", lambda x: x[:, :, 1::3, 2::3], aten.slice),
    fn("focus", lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2]], 1), aten.cat, (10, 12)),
    fn("mean over channels", lambda x: x * x.mean(1, keepdim=True).sigmoid(), aten.mean),
    fn("mean and maximum of channels", lambda x: torch.cat([x.mean(1, True), x.amax(1, True)], 1), aten.amax),
    fn("sum over channels without the dimension", lambda x: x.sum(1).unsqueeze(1), aten.sum),
    fn("blocks of rows", lambda x: x.unflatten(2, (3, 4)).amax(3), aten.amax, (12, 5)),
]
GATHERING = [
    Case("squeeze and excitation", lambda: SqueezeExcitation(C), aten.adaptive_avg_pool2d),
    Case(
        "two squeezes",
        lambda: nn.Sequential(SqueezeExcitation(C), nn.Conv2d(C, C, 3, 1, 1), SqueezeExcitation(C, nn.ReLU())),
        aten.adaptive_avg_pool2d,
    ),
    fn("gate by the mean", lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), aten.mean),
    fn("expanded gate", lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x).sigmoid(), aten.mean),
    fn("expanded channels", lambda x: x * x.mean(1, keepdim=True).expand(-1, C, -1, -1), aten.expand),
    fn("gate by the maximum", lambda x: x - x.amax((2, 3), keepdim=True), aten.amax),
    fn("gate by the sum", lambda x: x * x.sum((2, 3))[:, :, None, None].tanh(), aten.sum),
    Case(
        "pool and classify",
        lambda: nn.Sequential(nn.Conv2d(C, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
        aten.adaptive_avg_pool2d,
        between=False,
    ),
    fn("global max pool", lambda x: x.amax((2, 3)), aten.amax, between=False),
    fn("mean of all", lambda x: x.mean(), aten.mean, between=False),
    fn("several outputs", lambda x: (x * 2, x.mean((2, 3)), x[:, :, ::2]), aten.mean, between=False),
]
CASES = [*CONVOLUTIONS, *TRANSPOSED, *POOLS, *RESAMPLING, *NORMS, *ELEMENTWISE, *MOVING, *GATHERING]


def sandwich(case: Case, module: nn.Module) -> nn.Module:
    """The op between two convolutions, so that it has parts as inputs and is read in parts."""
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(case.size) - 1]
    out = module.double()(torch.zeros(1, C, *case.size, dtype=torch.float64)).shape[1]
    return nn.Sequential(layer(C, C, 3, padding=1), module, layer(out, 2, 3, padding=1))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_alone(case: Case) -> None:
    subject = Subject.of(lively(case.module().double()), torch.randn(3, C, *case.size, dtype=torch.float64))
    assert case.op in subject.in_parts((0,))
    check_both_schedules(subject, case.sliceable)
    check_macs(subject, subject.stretch((0,), rows=2))
    check_macs(subject, subject.stretch(case.sliceable, tiles=(2,) * len(case.sliceable)))


@pytest.mark.parametrize("case", [c for c in CASES if c.between], ids=[c.name for c in CASES if c.between])
def test_between_convolutions(case: Case) -> None:
    module = lively(sandwich(case, case.module().double().eval()).double())
    subject = Subject.of(module, torch.randn(1, C, *case.size, dtype=torch.float64))
    check_both_schedules(subject, case.sliceable)
    check_macs(subject, subject.stretch((0,), rows=3))


SINGLE = [case for case in ELEMENTWISE if case.between and "dtype" not in case.name]


@pytest.mark.parametrize("case", SINGLE, ids=[case.name for case in SINGLE])
def test_elementwise_in_float32(case: Case) -> None:
    """torch has kernels of its own for it, which may write by other strides than those of `out`."""
    first, second = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 5, padding=2)
    module = lively(nn.Sequential(first, case.module(), second, case.module()))
    check_both_schedules(Subject.of(module, torch.randn(2, C, *case.size)), case.sliceable)
