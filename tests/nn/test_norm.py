"""Converted norms compute what the original ones do, in every family, dtype and mixture, and keep nothing upcast."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import memsave
from memsave.nn.norm import ConvertedRMSNorm
from memsave.nn.rms_norm import Style, rms_norm_style

from .helpers import HFStyleRMSNorm, assert_same, converted, gradients


class ScaleThenCastRMSNorm(HFStyleRMSNorm):
    """Rounds once, after the weight, as OLMo 2 does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


class OnePlusRMSNorm(HFStyleRMSNorm):
    """The weight is an offset from one, as in Gemma."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * (1.0 + self.weight.float())).type_as(hidden_states)


class PowRMSNorm(HFStyleRMSNorm):
    """Another spelling of the same formula, with its own last bit."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon, -0.5)
        return (self.weight.float() * wide).to(hidden_states.dtype)


class WeightCastRMSNorm(HFStyleRMSNorm):
    """Rounds to the weight's dtype, as T5 does."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.float().pow(2).mean(-1, keepdim=True)
        wide = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        half = self.weight.dtype in (torch.float16, torch.bfloat16)
        return self.weight * (wide.to(self.weight.dtype) if half else wide)


class WeightlessRMSNorm(nn.Module):
    eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class GatedRMSNorm(HFStyleRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) * gate


class CenteredRMSNorm(HFStyleRMSNorm):
    """Only named like an RMSNorm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


STYLES = {
    HFStyleRMSNorm: Style.CAST_THEN_SCALE,
    ScaleThenCastRMSNorm: Style.SCALE_THEN_CAST,
    WeightCastRMSNorm: Style.CAST_TO_WEIGHT,
    PowRMSNorm: Style.SCALE_THEN_CAST,
    OnePlusRMSNorm: Style.ONE_PLUS,
}
WIDTH = 48


def make(cls: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    module = cls() if cls is WeightlessRMSNorm else cls(WIDTH)
    for p in module.parameters():
        nn.init.normal_(p)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", STYLES)
def test_style_is_recognized_by_what_the_forward_computes(cls: type[nn.Module], dtype: torch.dtype) -> None:
    assert rms_norm_style(make(cls, dtype)) is STYLES[cls]
    assert rms_norm_style(make(cls, dtype).to("meta")) is STYLES[cls]


def test_recognizing_a_style_leaves_the_random_state_alone() -> None:
    module = OnePlusRMSNorm(WIDTH + 1)
    before = torch.get_rng_state()
    rms_norm_style(module)
    assert torch.equal(before, torch.get_rng_state())


class OptionallyGatedRMSNorm(HFStyleRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        y = super().forward(hidden_states)
        return y if gate is None else y * gate


class OtherEpsRMSNorm(HFStyleRMSNorm):
    """Its eps has a name that is not looked for."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.norm_eps = self.__dict__.pop("variance_epsilon")

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.norm_eps)


class OutsideEpsRMSNorm(HFStyleRMSNorm):
    """Adds eps outside of the root, which shows in small rows only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)).to(x.dtype)


class ChannelRMSNorm(HFStyleRMSNorm):
    """Normalizes over the first dimension but one, which is the last one only of matrices."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def test_the_verdict_belongs_to_modules_with_equal_attributes() -> None:
    class GroupedRMSNorm(HFStyleRMSNorm):
        groups = 1

        def forward(self, x: Tensor) -> Tensor:
            wide = x.float().unflatten(-1, (self.groups, -1))
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * wide.flatten(-2).to(x.dtype)

    one, two = make(GroupedRMSNorm), make(GroupedRMSNorm)
    two.groups = 2
    assert rms_norm_style(one) is Style.CAST_THEN_SCALE
    assert rms_norm_style(two) is None


def test_styles_are_recognized_under_other_default_devices_and_modes() -> None:
    with torch.device("meta"):
        assert rms_norm_style(HFStyleRMSNorm(WIDTH + 3)) is Style.CAST_THEN_SCALE
    with FakeTensorMode():
        assert rms_norm_style(HFStyleRMSNorm(WIDTH + 5)) is Style.CAST_THEN_SCALE


UNKNOWN = [
    *(GatedRMSNorm, OptionallyGatedRMSNorm, CenteredRMSNorm),
    *(OtherEpsRMSNorm, OutsideEpsRMSNorm, ChannelRMSNorm),
]


@pytest.mark.parametrize("cls", UNKNOWN)
def test_a_forward_of_another_kind_is_left_alone_and_named(cls: type[nn.Module]) -> None:
    model = nn.Sequential(make(cls), nn.Linear(WIDTH, 2))
    report = memsave.convert_model(model)
    assert type(model[0]) is cls
    assert [s.reason for s in report.skipped] == [f"the forward of {cls.__name__} agrees with no known RMSNorm formula"]


def mixtures() -> list[tuple[type[nn.Module], torch.dtype, torch.dtype]]:
    half, single = torch.bfloat16, torch.float32
    families = [*STYLES, WeightlessRMSNorm, nn.RMSNorm, nn.LayerNorm]
    pairs = [(single, single), (half, half), (single, half)]
    return [(cls, w, x) for cls in families for w, x in pairs]


def oracle(module: nn.Module, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The gradients in fp64, for the same upstream gradient (rounded to `dtype`)."""
    weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
    eps = next(e for name in ("variance_epsilon", "eps") if (e := getattr(module, name, 0)) != 0)
    leaves = [t.detach().double().requires_grad_(True) for t in (x, weight, bias) if t is not None]
    centered = leaves[0] - leaves[0].mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else leaves[0]
    y = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(torch.float32).eps))
    if weight is not None:
        y = y * (leaves[1] + (isinstance(module, OnePlusRMSNorm)))
    if bias is not None:
        y = y + leaves[2]
    return list(torch.autograd.grad(y, leaves, torch.linspace(-1, 2, y.numel(), dtype=dtype).view_as(y).double()))


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize(("cls", "weight_dtype", "dtype"), mixtures())
def test_forward_and_gradients(
    cls: type[nn.Module], weight_dtype: torch.dtype, dtype: torch.dtype, autocast: bool
) -> None:
    """The output is equal bit for bit (but for `pow`'s last bit); the gradients' errors are those of the original."""
    plain = make(cls, weight_dtype)
    model = converted(nn.Sequential(plain, nn.Linear(WIDTH, 4)))
    ours = model[0]
    assert type(ours) is not type(plain)
    x = (torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(3)) * 2).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, expected = ours(x.requires_grad_(True)), plain(x)
        assert y.dtype == expected.dtype
        if cls is not PowRMSNorm:
            assert torch.equal(y, expected)
        actual, wanted = gradients(ours, ours, x), gradients(plain, plain, x)
    for a, w, e in zip(actual, wanted, oracle(plain, x, y.dtype), strict=True):
        assert a.dtype == w.dtype
        band = torch.finfo(a.dtype).eps * e.abs().max()
        assert (a.double() - e).abs().max() <= 2 * ((w.double() - e).abs().max() + band)


@pytest.mark.parametrize("cls", [nn.RMSNorm, nn.LayerNorm])
def test_gradcheck(cls: type[nn.Module]) -> None:
    model = converted(nn.Sequential(cls(6), nn.Linear(6, 3), nn.Linear(3, 2)).double())
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    parameters = list(model.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *parameters))


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    width=st.integers(1, 9),
    cls=st.sampled_from([nn.RMSNorm, nn.LayerNorm, HFStyleRMSNorm]),
    contiguous=st.booleans(),
)
def test_any_shape_and_stride(shape: list[int], width: int, cls: type[nn.Module], contiguous: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(cls(width), nn.Linear(width, 3))
    ours = converted(plain)
    x = torch.randn(*shape, width)
    if not contiguous and x.dim() > 1:
        x = torch.randn(*shape, width).transpose(0, -2).contiguous().transpose(0, -2)
    actual, expected = gradients(ours, ours, x), gradients(plain, plain, x)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [*STYLES, nn.RMSNorm, nn.LayerNorm])
def test_kept_bytes(cls: type[nn.Module], dtype: torch.dtype) -> None:
    """x in its own dtype, and one fp32 statistic per row (LayerNorm of fp32: two)."""
    plain = make(cls, dtype)
    ours = converted(nn.Sequential(plain, nn.Linear(WIDTH, 4, dtype=dtype)))[0]
    x = torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=True)
    expected = 15 * WIDTH * dtype.itemsize + 15 * (8 if cls is nn.LayerNorm and dtype == torch.float32 else 4)
    assert ours.kept_bytes((3, 5, WIDTH), dtype) == expected
    assert memsave.saved_bytes(lambda: ours(x)) == expected
    assert memsave.saved_bytes(lambda: plain(x)) >= expected


def test_layer_norm_keeps_one_statistic_of_half_inputs_beside_float32_parameters() -> None:
    plain = make(nn.LayerNorm)
    ours = converted(nn.Sequential(plain, nn.Linear(WIDTH, 4)))[0]
    x = torch.randn(3, 5, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    assert ours.kept_bytes(x.shape, x.dtype) == memsave.saved_bytes(lambda: ours(x)) == 15 * (2 * WIDTH + 4)
    assert memsave.saved_bytes(lambda: plain(x)) == 15 * (2 * WIDTH + 8)


def test_layer_norm_sums_the_gradients_of_its_parameters_in_float32() -> None:
    """torch adds them up in bfloat16 on the CPU: over 4,096 rows that is off by a tenth."""
    ours = converted(nn.Sequential(make(nn.LayerNorm, torch.bfloat16), nn.Linear(WIDTH, 4, dtype=torch.bfloat16)))[0]
    x, dy = (torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (3, 4))
    wide = x.double()
    xhat = (wide - wide.mean(-1, keepdim=True)) * torch.rsqrt(wide.var(-1, correction=0, keepdim=True) + ours.eps)
    ours(x).backward(dy)
    for found, exact in [(ours.weight.grad, (dy.double() * xhat).sum(0)), (ours.bias.grad, dy.double().sum(0))]:
        assert (found.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("without", ["weight", "bias"])
def test_a_note_of_layer_norm_tells_a_bias_from_a_weight(without: str) -> None:
    plain = nn.Sequential(make(nn.LayerNorm), nn.Linear(WIDTH, 4))
    setattr(plain[0], without, None)
    ours, x = converted(plain), torch.randn(7, WIDTH)
    assert_same(gradients(ours, ours, x), gradients(plain, plain, x), ulps=4)


def test_an_rms_norm_may_be_called_a_layer_norm() -> None:
    """As in the families that follow T5."""

    class SwitchLayerNorm(HFStyleRMSNorm):
        pass

    class CenteredLayerNorm(HFStyleRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    model = nn.Sequential(make(SwitchLayerNorm), make(CenteredLayerNorm), nn.Linear(WIDTH, 2))
    report = memsave.convert_model(model)
    assert isinstance(model[0], ConvertedRMSNorm) and not isinstance(model[1], ConvertedRMSNorm)
    assert [s.reason for s in report.skipped] == [
        "the forward of CenteredLayerNorm agrees with no known RMSNorm formula"
    ]


def test_eps_and_weight_dtype_may_change_after_conversion() -> None:
    model = converted(nn.Sequential(make(HFStyleRMSNorm), nn.Linear(WIDTH, 4)))
    plain = make(HFStyleRMSNorm)
    for norm in (model[0], plain):
        norm.variance_epsilon = 0.5
        norm.bfloat16()
    x = torch.randn(7, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(model[0](x), plain(x))
    assert_same(gradients(model[0], model[0], x), gradients(plain, plain, x), ulps=4)


def test_a_dtensor_is_normalized_by_operators_that_it_knows() -> None:
    """As sequence parallelism has it: a sharded input and a replicated weight."""
    plain = make(HFStyleRMSNorm)
    ours = converted(nn.Sequential(plain, nn.Linear(WIDTH, 4)))[0]
    x = torch.randn(2, 3, WIDTH)
    expected = gradients(plain, plain, x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        ours.weight = nn.Parameter(distribute_tensor(ours.weight.detach(), mesh, [Replicate()]))
        sharded = distribute_tensor(x, mesh, [Shard(1)]).requires_grad_(True)
        y = ours(sharded)
        upstream = torch.linspace(-1, 2, y.numel()).view(y.shape)
        found = torch.autograd.grad(y, (sharded, ours.weight), distribute_tensor(upstream, mesh, [Shard(1)]))
        assert_same([t.full_tensor() for t in found], expected, ulps=16)
    finally:
        dist.destroy_process_group()
