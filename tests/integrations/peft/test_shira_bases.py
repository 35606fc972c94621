"""What SHiRA goes around: quantized weights, hooks, converted linears; what it refuses, and how it says so."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import UnsupportedModelError

from ...snapshot import snapshot
from .shira import OUT, WIDTH, Toy, adapted, config, gradients, indices, layers, one, same, values, weights


class Int8Linear(nn.Linear):
    """A stand-in for quantized linears: whole numbers, a scale for each output, and a forward of its own."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (plain.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.bias = nn.Parameter(plain.bias.detach().clone())
        self.register_buffer("scale", scale)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantized(**settings: Any) -> tuple[Any, Any, Int8Linear, nn.Linear]:
    """A PEFT model around a quantized linear, its layer, the linear, and a plain one of the same function."""
    torch.manual_seed(0)
    linear = Int8Linear(nn.Linear(WIDTH, OUT).double())
    plain = nn.Linear(WIDTH, OUT).double()
    plain.weight.data, plain.bias.data = linear.weight.double() * linear.scale, linear.bias.data.clone()
    return *one(linear, **settings), linear, plain


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_a_quantized_linear_runs_its_own_forward_beside_a_sparse_product(keep_ratio: float) -> None:
    model, layer, linear, plain = quantized(keep_ratio=keep_ratio)
    dense_model, dense = one(plain, keep_ratio=keep_ratio)
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    whole = linear.weight.clone()
    torch.testing.assert_close(model(x), dense_model(x), rtol=0, atol=1e-12)
    assert linear.calls == 1 and values(model)[0].dtype == torch.float64
    found = []
    for m in (model, dense_model):
        torch.manual_seed(3)
        found.append(gradients(m, m, x))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.optim.SGD(values(model), lr=0.1).step()
    assert not torch.allclose(model(x), dense_model(x)) and torch.equal(linear.weight, whole)
    with model.disable_adapter():
        assert torch.equal(model(x), linear(x))
    assert model.unload().lin is linear


def test_a_quantized_weight_is_not_merged() -> None:
    model, layer, linear, _ = quantized()
    whole = linear.weight.clone()
    for call in (model.merge_adapter, layer.merge, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="SHiRA: merge: the weight is sharded or quantized.*Nothing was changed"):
            call()
    assert torch.equal(linear.weight, whole) and not layer.merged


@pytest.mark.parametrize("mask", ["magnitude", "gradient", "snip"])
def test_masks_that_need_a_quantized_weights_values_are_refused(mask: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"lin: a {mask} mask needs the weight's values.*quantized"):
        quantized(mask=mask, calibration=[torch.randn(2, WIDTH)])


def test_a_quantized_linear_converted_by_name() -> None:
    model = nn.Sequential(OrderedDict(lin=Int8Linear(nn.Linear(WIDTH, OUT))))
    report = memsave.convert_model(model, config(target_modules=["lin"]))
    assert len(layers(model)) == 1 and "lin" in str(report)


def test_hooks_of_the_base_layer_run() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT)
    plain.register_forward_hook(lambda m, args, y: y * 2.0)
    plain.register_forward_pre_hook(lambda m, args: (args[0] + 1.0,))
    model, layer = one(plain)
    x = torch.randn(3, WIDTH)
    expected = nn.functional.linear(x + 1.0, plain.weight, plain.bias) * 2.0
    assert torch.equal(model(x), expected)
    with torch.no_grad(), model.disable_adapter():
        original = nn.functional.linear(x + 1.0, layer.held.original_weight(), plain.bias) * 2.0
        assert torch.equal(model(x), original)


def test_one_linear_in_two_places_is_one_layer() -> None:
    """Its weight is not tied to another's: it is the same module."""
    torch.manual_seed(0)
    model = nn.Module()
    model.a, model.b = nn.Module(), nn.Module()
    model.a.lin = model.b.lin = nn.Linear(WIDTH, WIDTH)
    tuned = peft.get_peft_model(model, config(target_modules=["a.lin"]))
    assert len(layers(tuned)) == 1


class Odd(nn.Module):
    """Something for each reason to refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.embedding.weight
        self.turned = nn.Linear(WIDTH, WIDTH)
        self.turned.weight = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.complex = nn.Linear(WIDTH, WIDTH, dtype=torch.complex64)
        with torch.device("meta"):
            self.huge = nn.Linear(2**16, 2**15)
        self.conv = nn.Conv2d(1, 1, 1)
        self.bilinear = nn.Bilinear(2, 2, 2)
        self.own = type("Own", (nn.Linear,), {"forward": lambda self, x: x})(2, 2)
        self.small = nn.Linear(2, 2)
        self.fine = nn.Linear(WIDTH, WIDTH)


REASONS = {
    "tied": "tied: its weight is tied to embedding.weight, which would change, too",
    "turned": "turned: its weight is not contiguous in memory",
    "complex": "complex: its weight is complex",
    "huge": "huge: its weight has 2147483648 entries, more than the 2147483647",
    "conv": "conv: expected an nn.Linear or Conv1D, got Conv2d",
    "bilinear": "bilinear: expected an nn.Linear or Conv1D, got Bilinear",
    "own": "own: expected an nn.Linear or Conv1D, got Own",
    "small": "small: 8 values were asked for, more than its 4 entries; lower r or density",
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_refused_leaves_the_model_unchanged(name: str, unchanged: Any) -> None:
    model = unchanged(Odd())
    with pytest.raises(UnsupportedModelError) as raised:
        peft.get_peft_model(model, config(density=None, r=2, target_modules=["fine", name]))
    assert REASONS[name] in str(raised.value) and "fine:" not in str(raised.value)
    assert str(raised.value).endswith("The model was not changed.")


def test_everything_that_is_refused_is_named_at_once(unchanged: Any) -> None:
    model = unchanged(Odd())
    wanted = config(density=None, r=2, target_modules=["fine", *REASONS])
    with pytest.raises(UnsupportedModelError) as raised:
        peft.get_peft_model(model, wanted)
    assert all(reason in str(raised.value) for reason in REASONS.values())


def test_a_further_adapter_that_is_refused_leaves_the_first() -> None:
    torch.manual_seed(0)
    model = adapted(Toy(), target_modules=["q"])
    model.base_model.model.k.weight = model.base_model.model.v.weight
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match="k: its weight is tied to v.weight"):
        model.add_adapter("other", config(target_modules=["k", "q"]))
    assert snapshot(model) == before and list(model.peft_config) == ["default"]


def test_a_linear_with_another_kind_of_adapter_is_refused() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(Toy(), peft.LoraConfig(r=1, target_modules=["q"])).base_model.model
    with pytest.raises(UnsupportedModelError, match="q: it carries an adapter of another kind .Linear."):
        peft.get_peft_model(model, config(target_modules=["q", "k"]))


def test_targets_are_needed(unchanged: Any) -> None:
    model = unchanged(Toy())
    with pytest.raises(ValueError, match="SHiRAConfig.target_modules: expected names of linears.*got None"):
        peft.get_peft_model(model, memsave.SHiRAConfig())


def test_a_base_that_memsave_converted_stays_so() -> None:
    """A sampled linear under SHiRA: its own weight is frozen, so that only SHiRA decides what is kept."""
    torch.manual_seed(0)
    model, layer = one(nn.Linear(WIDTH, OUT).double())
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    expected = gradients(model, model, x)
    memsave.convert_model(model.base_model.model, memsave.RecomputeNormConfig(target_modules=["base_layer"]))
    assert type(layer.base_layer).__name__ == "MemsaveLinear"
    for a, b in zip(gradients(model, model, x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert memsave.saved_bytes(lambda: model(x)) == x.nbytes


def test_inference_tensors_and_inference_mode() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT)
    model, layer = one(plain)
    x = torch.randn(3, WIDTH)
    on = model(x)
    with torch.inference_mode():
        assert torch.equal(model(x), on)
        with model.disable_adapter():
            off = model(x)
        model.add_adapter("other", config(seed=2))
        model.set_adapter("other")
        assert torch.equal(model(x), off)
        model.set_adapter("default")
        assert torch.equal(model(x), on)
    assert not torch.equal(on, off)
    model(x).sum().backward()
    assert values(model)[0].grad is not None


def test_the_default_device_and_dtype_do_not_matter() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, layer = one(nn.Linear(WIDTH, OUT, dtype=torch.float32))
    finally:
        torch.set_default_dtype(torch.float32)
    assert values(model)[0].dtype == torch.float32
    other, _ = one(nn.Linear(WIDTH, OUT), dtype="bfloat16")
    assert values(other)[0].dtype == torch.bfloat16
    assert torch.equal(indices(layer), indices(layers(other)[0])) and not same(weights(model), weights(other))
