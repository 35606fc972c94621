"""`LowRankLinear`, what stands for its weight, and the way from a linear to it and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memsave.nn.low_rank.factorize import factorize_heads
from memsave.nn.low_rank.linear import LowRankLinear
from memsave.nn.low_rank.replacing import dense, empty_low_rank, low_rank, structure

from ..helpers import assert_same

property_settings = settings(max_examples=40, deadline=None, derandomize=True)


def filled(*sizes: int, **settings: Any) -> LowRankLinear:
    """With random factors in float64."""
    module = LowRankLinear(*sizes, dtype=torch.float64, **settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def conv1d(outputs: int, inputs: int) -> nn.Module:
    transformers = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    return transformers.Conv1D(outputs, inputs)


@st.composite
def linears(draw: st.DrawFn) -> LowRankLinear:
    """Of any size, by heads or not, with or without a bias."""
    heads = draw(st.none() | st.integers(1, 4))
    sizes = draw(st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 6)))
    return filled(
        sizes[0],
        sizes[1] * (heads or 1),
        sizes[2],
        heads=heads,
        bias=draw(st.booleans()),
        transposed=draw(st.booleans()),
    )


@property_settings
@given(module=linears(), leading=st.lists(st.integers(0, 3), max_size=3))
def test_it_is_the_linear_of_its_dense_weight(module: LowRankLinear, leading: list[int]) -> None:
    x = numbers(*leading, module.in_features)
    weight = module.dense_weight()
    assert weight.shape == module.weight.shape and weight.dtype == torch.float64 and weight.is_contiguous()
    expected = F.linear(x, weight.t() if module.transposed else weight, module.bias)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert module.project(x).shape[-1] == module.latent_features
    assert torch.equal(module.weight[:, 0], weight[:, 0])  # as some models look biases of positions up


@property_settings
@given(module=linears(), data=st.data())
def test_chosen_features_are_those_of_the_whole(module: LowRankLinear, data: st.DataObject) -> None:
    """Any blocks, in any order."""
    blocks = module.heads or module.out_features
    width = module.out_features // blocks
    cuts = st.tuples(st.integers(0, blocks - 1), st.integers(1, blocks)).filter(lambda cut: cut[0] < cut[1])
    parts = [slice(a * width, b * width) for a, b in data.draw(st.lists(cuts, min_size=1, max_size=3))]
    latent = module.project(numbers(2, 3, module.in_features))
    whole = module.expand(latent)
    expected = torch.cat([whole[..., part] for part in parts], -1)
    torch.testing.assert_close(module.expand(latent, parts), expected, rtol=1e-12, atol=1e-12)


@property_settings
@given(inputs=st.integers(1, 9), data=st.data())
def test_the_latent_adds_up_from_columns(inputs: int, data: st.DataObject) -> None:
    module, x = filled(inputs, 4, 3), numbers(5, inputs)
    cuts = sorted({0, inputs, *data.draw(st.lists(st.integers(0, inputs), max_size=3))})
    total = torch.zeros(5, 3, dtype=torch.float64)
    for start, stop in zip(cuts, cuts[1:], strict=False):
        module.accumulate(total, x[:, start:stop], slice(start, stop))
    torch.testing.assert_close(total, module.project(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [nn.Linear, lambda d, o: conv1d(o, d)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("heads", [None, 4])
def test_full_rank_reproduces_the_layer(make: Any, dtype: torch.dtype, inputs: int, outputs: int, heads: Any) -> None:
    linear = make(inputs, outputs).to(dtype)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(0))
    made = low_rank(linear, min(outputs // (heads or 1), inputs), heads)
    assert_same([made.dense_weight()], [linear.weight.detach()], ulps=8)
    x = numbers(30, inputs).to(dtype)
    with torch.no_grad():
        assert_same([made(x)], [linear(x)], ulps=16)
    assert made.bias is linear.bias and made.transposed is (make is not nn.Linear)


def test_a_lower_rank_is_the_truncated_svd() -> None:
    linear = nn.Linear(12, 20).double()
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    for rank in (1, 5):
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(low_rank(linear, rank).dense_weight(), best, rtol=1e-9, atol=1e-9)


def test_each_head_is_the_truncated_svd_of_its_rows() -> None:
    linear = nn.Linear(12, 20).double()
    found = low_rank(linear, 2, 4).dense_weight().unflatten(0, (4, 5))
    for block, rows in zip(found, linear.weight.detach().unflatten(0, (4, 5)), strict=True):
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        torch.testing.assert_close(block, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads", [None, 4])
def test_whitened_factors_err_less_on_the_inputs(heads: int | None) -> None:
    """Inputs of features whose sizes differ by orders of magnitude."""
    linear = nn.Linear(12, 20).double()
    x = numbers(50, 12) @ numbers(12, 12) * torch.logspace(0, -3, 12, dtype=torch.float64)
    with torch.no_grad():
        plain, whitened = (low_rank(linear, 3, heads, moment=m) for m in (None, x.t() @ x))
        errors = [float((each(x) - linear(x)).norm()) for each in (plain, whitened)]
        of_weight = [float((each.dense_weight() - linear.weight).norm()) for each in (plain, whitened)]
    assert errors[1] < 0.5 * errors[0] and of_weight[1] > of_weight[0]


class OwnLinear(nn.Linear):
    """A subclass with an attribute."""

    remark = "none"


def watch(module: nn.Module, args: Any, output: Any) -> None:
    watch.seen.append(type(module))  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [OwnLinear, lambda d, o: conv1d(o, d)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("heads", [None, 2])
def test_there_and_back(make: Any, heads: int | None) -> None:
    """Class, attributes, flags, hooks and the bias stay; the weight is the product of the factors."""
    linear = make(6, 8)
    nn.init.normal_(linear.weight)
    linear.remark = "mine"
    linear.weight.requires_grad_(False)
    handle = linear.register_forward_hook(watch)
    made = low_rank(linear, 2, heads, lazy=True)
    assert [p.requires_grad for p in made.parameters()] == [False, False, True]
    back = dense(made)
    assert type(back) is type(linear) and back.remark == "mine" and back.bias is linear.bias
    assert back.__dict__.keys() == linear.__dict__.keys() and back.extra_repr() == linear.extra_repr()
    assert list(back.state_dict()) == list(linear.state_dict()) and not back.weight.requires_grad
    x = torch.randn(3, 6)
    watch.seen = []  # type: ignore[attr-defined]
    with torch.no_grad():
        assert_same([back(x)], [made(x)])
    assert watch.seen == [type(linear), LowRankLinear]  # type: ignore[attr-defined]
    handle.remove()
    assert not back._forward_hooks and not made._forward_hooks


def test_an_empty_one_has_the_same_structure() -> None:
    linear = nn.Linear(6, 8)
    made = low_rank(linear, 2, 4, lazy=True)
    assert structure(made) == {"rank": 2, "heads": 4, "lazy": True}
    empty = empty_low_rank(linear, **structure(made))
    assert empty.extra_repr() == made.extra_repr() == "in_features=6, out_features=8, rank=2, heads=4, bias=True"
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}
    factors = factorize_heads(linear.weight, 2, 4)
    empty.load_state_dict({"first": factors.first, "second": factors.second, "bias": linear.bias})
    x = torch.randn(3, 6)
    assert torch.equal(empty(x), made(x))


@pytest.fixture
def factored() -> LowRankLinear:
    return filled(6, 8, 2)


def test_the_weight_tells_its_kind_without_being_made(factored: LowRankLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LowRankLinear, "dense_weight")
    weight: Any = factored.weight
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.float64, torch.device("cpu"), True)
    assert weight.shape == weight.size() == (8, 6) and weight.size(0) == 8 and weight.dim() == weight.ndim == 2
    factored.transposed = True
    assert weight.shape == (6, 8) and weight.size(-1) == 8


def test_functions_of_torch_read_the_weight(factored: LowRankLinear) -> None:
    weight: Any = factored.weight
    made, x = factored.dense_weight(), numbers(3, 6)
    assert torch.equal(F.linear(x, weight), F.linear(x, made))
    assert torch.equal(torch.mm(x, weight.t()), x @ made.t()) and torch.equal(weight.abs(), made.abs())
    assert torch.equal(torch.norm(input=weight), made.norm())


@pytest.mark.parametrize(
    "write",
    [
        lambda module: nn.init.zeros_(module.weight),
        lambda module: module.weight.zero_(),
        lambda module: module.weight.data.zero_(),
        lambda module: torch.relu_(module.weight),
        lambda module: torch.zeros(6, 6).copy_(module.weight.grad),
        lambda module: setattr(module, "weight", nn.Parameter(torch.zeros(8, 6))),
        lambda module: setattr(module, "weight", torch.zeros(8, 6)),
        lambda module: setattr(module.weight, "data", torch.zeros(8, 6)),
    ],
)
@torch.no_grad()
def test_what_would_write_to_the_weight_fails(factored: LowRankLinear, write: Any) -> None:
    before = factored.dense_weight()
    with pytest.raises((AttributeError, KeyError, TypeError)):
        write(factored)
    assert torch.equal(factored.dense_weight(), before)


def test_gradients_reach_the_factors(factored: LowRankLinear) -> None:
    names = [name for name, _ in factored.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(factored, dict(zip(names, values, strict=True)), numbers(3, 6))

    assert names == ["first", "second", "bias"]
    assert torch.autograd.gradcheck(run, [p.detach().requires_grad_() for p in factored.parameters()])
