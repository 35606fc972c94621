"""The weight that holds the values: off and on, switched, merged, moved, saved and copied, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

import memsave

from .shira import (
    LINEARS,
    OUT,
    WIDTH,
    Toy,
    adapted,
    compiled,
    config,
    gradients,
    indices,
    layers,
    one,
    randomize,
    same,
    upstream,
    values,
    weights,
)

linears = pytest.mark.parametrize("kind", LINEARS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def two(dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[nn.Module, Any]:
    """A plain toy, and one with two trained adapters whose masks overlap."""
    torch.manual_seed(0)
    plain = Toy().to(dtype)
    model = adapted(plain, **settings)
    model.add_adapter("other", config(density=0.5, seed=5, **{k: v for k, v in settings.items() if k == "apply"}))
    randomize(model, "other", seed=8)
    return plain, model


@dtypes
@linears
def test_off_without_gradients_gives_the_original_bits(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = LINEARS[kind]().to(dtype)
    model, layer = one(copy.deepcopy(plain))
    weight = layer.base_layer.weight
    x = torch.randn(5, WIDTH).to(dtype)
    on, held, version = model(x), weight.detach().clone(), weight._version
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    assert weight._version == version and torch.equal(weight, held)
    assert torch.equal(model(x), on) and not torch.equal(on, plain(x))


@linears
def test_off_with_gradients_is_the_base_up_to_rounding(kind: str) -> None:
    torch.manual_seed(0)
    plain = LINEARS[kind]().double()
    model, layer = one(copy.deepcopy(plain))
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    (expected,) = gradients(plain.requires_grad_(False), plain, x)
    version = layer.base_layer.weight._version
    with model.disable_adapter():
        (dx,) = gradients(model, model, x)
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-12)
        torch.testing.assert_close(compiled(model)(x), plain(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dx, expected, rtol=0, atol=1e-12)
    assert layer.base_layer.weight._version == version
    assert not torch.allclose(gradients(model, model, x)[0], expected)


def test_an_error_in_forward_while_off_leaves_the_values_on() -> None:
    model, layer = one(nn.Linear(WIDTH, OUT))
    held = layer.base_layer.weight.detach().clone()
    with torch.no_grad(), model.disable_adapter(), pytest.raises(RuntimeError):
        model(torch.randn(3, WIDTH + 1))
    assert torch.equal(layer.base_layer.weight, held)


@pytest.mark.parametrize("apply", ["auto", "added"])
def test_the_order_of_dpo(apply: str) -> None:
    """Policy forward, adapter off, reference forward, adapter on, backward: the gradients are those without it."""
    torch.manual_seed(0)
    plain = Toy().double()
    model = adapted(plain, apply=apply)
    x = torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    policy = model(x)
    with torch.no_grad(), model.disable_adapter():
        reference = model(x)
        torch.testing.assert_close(reference, plain(x), rtol=0, atol=1e-12)
    model.train()
    ((policy - reference) * upstream(policy)).sum().backward()
    found = [x.grad, *(p.grad for p in values(model))]
    expected = gradients(model, model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
@pytest.mark.parametrize("change", ["set_adapter", "merge_adapter", "delete_adapter"])
def test_other_adapters_between_forward_and_backward_raise(change: str, keep_ratio: float) -> None:
    _, model = two(keep_ratio=keep_ratio)
    y = model(torch.randn(40, WIDTH))  # needs no gradient of x: no weight is saved that torch itself would miss
    if change == "merge_adapter":
        model.merge_adapter(["default", "other"])
    else:
        getattr(model, change)("other" if change == "set_adapter" else "default")
    with pytest.raises(RuntimeError, match="SHiRA: other adapters were made active between forward and backward"):
        y.sum().backward()


def test_adding_an_adapter_between_forward_and_backward_is_allowed() -> None:
    model, _ = one(nn.Linear(WIDTH, OUT))
    y = model(torch.randn(4, WIDTH))
    model.add_adapter("other", config(seed=3))
    y.sum().backward()
    assert values(model)[0].grad is not None


@dtypes
def test_switching_a_thousand_times_returns_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, OUT).to(dtype)
    model, layer = one(copy.deepcopy(plain), density=0.5)
    model.add_adapter("other", config(density=0.5, seed=5))
    randomize(model, "other", seed=8)
    x = torch.randn(3, WIDTH).to(dtype)
    model.set_adapter("default")
    expected = model(x)
    assert 0 < len(set(indices(layer).tolist()) & set(indices(layer, "other").tolist())) < 48
    for _ in range(500):
        layer.set_adapter("other")
        layer.set_adapter("default")
    assert torch.equal(model(x), expected)
    assert same(weights(model.unload()), {f"lin.{n}": p for n, p in plain.named_parameters()})


@pytest.mark.parametrize("apply", ["auto", "added"])
@dtypes
def test_merging_and_back_is_exact(dtype: torch.dtype, apply: str) -> None:
    plain, model = two(dtype, apply=apply)
    x = torch.randn(4, WIDTH).to(dtype)
    on = model(x)
    model.merge_adapter()
    held = weights(model)
    assert torch.equal(model(x), on) or apply == "added"
    torch.testing.assert_close(model(x), on, rtol=0, atol=0.1 if dtype != torch.float32 else 1e-4)
    model.unmerge_adapter()
    assert torch.equal(model(x), on)
    merged = model.merge_and_unload()
    assert same(dict(merged.state_dict()), held) and type(merged.q) is nn.Linear
    assert not same(held, weights(plain))


def test_merging_two_and_taking_them_off() -> None:
    plain, model = two()
    held = weights(model)
    model.merge_adapter(["default", "other"])
    merged = weights(model)
    delta = {n: merged[n] - p for n, p in weights(plain).items()}
    for name, layer in zip("qkv", layers(model), strict=False):
        expected = layer.get_delta_weight("default").to_dense() + layer.get_delta_weight("other").to_dense()
        torch.testing.assert_close(delta[f"{name}.weight"], expected.detach())
    model.unmerge_adapter()
    assert same(weights(model), held)  # at once, not at the next forward
    model.set_adapter("other")
    assert same(weights(model.unload()), weights(plain))


def test_merged_and_turned_off() -> None:
    """`disable_adapter` of a merged model unmerges, as every tuner of PEFT does."""
    plain, model = two()
    x = torch.randn(4, WIDTH)
    model.merge_adapter()
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("apply", ["auto", "added"])
def test_a_safe_merge_refuses_what_is_not_finite(apply: str) -> None:
    plain, model = two(apply=apply)
    with torch.no_grad():
        layers(model)[0].memsave_shira_values["default"][1] = float("nan")
    with pytest.raises(ValueError, match="NaN.*adapter default.*Nothing was changed"):
        model.merge_adapter(safe_merge=True)
    assert not layers(model)[0].merged
    assert same(weights(model.unload()), weights(plain))


@pytest.mark.parametrize("active", ["default", "other"])
def test_deleting(active: str) -> None:
    plain, model = two()
    model.set_adapter(active)
    held = weights(model)
    model.delete_adapter("other")
    assert "other" not in str([*model.state_dict(), *(n for n, _ in model.named_buffers())])
    if active == "default":
        assert same(weights(model), held)
    else:
        assert not same(weights(model), held)
    assert same(weights(model.unload()), weights(plain))


def test_set_scale() -> None:
    plain, model = two()
    x = torch.randn(4, WIDTH)
    for layer in layers(model):
        layer.set_scale("default", 2.5)
        layer.set_scale("unknown", 9.0)
        original = layer.held.original_weight()
        expected = original + 2.5 * (layer.get_delta_weight("default").to_dense() / 2.5)
        torch.testing.assert_close(layer.base_layer.weight, expected)
        torch.testing.assert_close(layer(x), layer.reference(x))
    for layer in layers(model):
        layer.set_scale("default", 0.0)
    assert same(weights(model), weights(plain))


def test_state_dicts_hold_the_original_weights_under_peft_keys() -> None:
    plain, model = two()
    state = model.state_dict()
    base = {n.split("model.")[-1].replace("base_layer.", ""): t for n, t in state.items() if "shira" not in n}
    assert same(base, dict(plain.state_dict()))
    own = {n.split(".", 3)[-1] for n in state if "shira" in n}
    assert own == {f"memsave_shira_{part}.{name}" for part in ("values", "mask") for name in ("default", "other")}
    assert (
        model.state_dict(keep_vars=True)["base_model.model.q.base_layer.weight"] is layers(model)[0].base_layer.weight
    )


def test_a_state_dict_of_adapters_copies_no_weight() -> None:
    model, layer = one(nn.Linear(200, 200), density=0.01)
    for name in ("state dict", "adapters"):
        profile = memsave.measure(
            lambda n=name: get_peft_model_state_dict(model) if n == "adapters" else model.state_dict()
        )
        copied = profile.peak_bytes - profile.baseline_bytes >= layer.base_layer.weight.nbytes
        assert copied == (name == "state dict")
    assert sorted(get_peft_model_state_dict(model)) == [
        f"base_model.model.lin.memsave_shira_{part}" for part in ("mask", "values")
    ]


@pytest.mark.parametrize("assign", [False, True])
def test_another_base_under_an_adapter(assign: bool) -> None:
    """The values are added to what is loaded, and come off it again."""
    _, model = two()
    torch.manual_seed(9)
    other = Toy()
    renamed = {n.replace(".", ".base_layer."): t.clone() for n, t in other.state_dict().items()}
    found = model.base_model.model.load_state_dict(renamed, strict=False, assign=assign)
    assert not found.unexpected_keys and all("shira" in key for key in found.missing_keys)
    for layer, name in zip(layers(model), ("q", "k", "v", "out"), strict=True):
        original = getattr(other, name).weight
        expected = original.detach().clone().flatten()
        expected[indices(layer)] += layer.memsave_shira_values["default"].detach()
        assert torch.equal(layer.base_layer.weight.detach().flatten(), expected)
    assert same(weights(model.unload()), weights(other))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_whole_state_dict(assign: bool) -> None:
    """Values, masks of other entries, and base weights, all at once."""
    torch.manual_seed(0)
    source = adapted(Toy(), mask="magnitude")
    torch.manual_seed(1)
    target = adapted(Toy(), mask="magnitude", trained=False)
    x = torch.randn(4, WIDTH)
    assert not torch.equal(indices(layers(source)[0]), indices(layers(target)[0]))
    target.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert torch.equal(target(x), source(x))
    assert torch.equal(indices(layers(source)[0]), indices(layers(target)[0]))
    assert same(weights(target.unload()), weights(source.unload()))


@pytest.mark.parametrize("apply", ["auto", "added"])
def test_casting(apply: str) -> None:
    """The original, the values and the sums are each rounded, and the sum is of the rounded ones."""
    plain, model = two(apply=apply)
    model.to(torch.bfloat16)
    rounded = copy.deepcopy(plain).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    x = torch.randn(4, WIDTH).to(torch.bfloat16)
    for layer in layers(model):
        torch.testing.assert_close(layer(x), layer.reference(x), rtol=0.02, atol=0.05)
        expected = layer.held.original_weight().flatten()[indices(layer)] + layer.memsave_shira_values["default"]
        if apply == "auto":
            assert torch.equal(layer.base_layer.weight.flatten()[indices(layer)], expected)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), rounded(x))
    assert same(weights(model.unload()), weights(rounded))


def train(model: nn.Module, seed: int) -> list[Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed + step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, through_torch])
def test_copies_train_independently(copied: Callable[[Any], Any]) -> None:
    plain, model = two()
    twin = copied(model)
    x = torch.randn(3, WIDTH)
    before, on = weights(model), model(x)
    trained = train(twin, 1)
    assert same(weights(model), before) and torch.equal(model(x), on)
    assert all(torch.equal(a, b) for a, b in zip(train(model, 1), trained, strict=True))
    train(model, 5)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), trained, strict=True))
    assert not torch.equal(model(x), twin(x))
    assert same(weights(twin.unload()), weights(plain)) and same(weights(model.unload()), weights(plain))


@pytest.mark.parametrize("off", [False, True])
def test_added_equals_auto(off: bool) -> None:
    """Outputs, gradients, and the merged model."""
    found = []
    for apply in ("auto", "added"):
        torch.manual_seed(0)
        model = adapted(Toy().double(), apply=apply)
        x = torch.randn(5, WIDTH, dtype=torch.float64)
        assert same(weights(model), weights(Toy())) is False
        if off:
            with model.disable_adapter():
                outputs = [model(x), *gradients(model, model, x)]
        else:
            outputs = [model(x), *gradients(model, model, x)]
            outputs += [layer.merged_weight() for layer in layers(model)]
        found.append([*outputs, *model.merge_and_unload().state_dict().values()])
    assert len(found[0]) == (2 + 8 if off else 2 + 4 + 4 + 8)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_added_leaves_the_weight_alone() -> None:
    plain, model = two(apply="added")
    train(model, 1)
    assert same(weights(model), weights(plain))
    assert all(len(layer.memsave_shira_originals) == 0 for layer in layers(model))


def test_peft_models_know_the_layer() -> None:
    """What PEFT reads of a layer: features, the weight, how it prints."""
    model, layer = one(nn.Linear(WIDTH, OUT), density=0.1)
    assert isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer)
    assert (layer.in_features, layer.out_features) == (WIDTH, OUT)
    assert "shira.SHiRALinear" in repr(model) and "default: random, 10 of 96 entries" in repr(model)
    assert model.get_nb_trainable_parameters()[0] == 10
