"""The layer: what it computes, keeps and merges, in every mode that PEFT and torch have."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

import memsave
from memsave.integrations.peft.lamda import LaMDALinear
from memsave.nn.bottleneck import add_bottleneck, add_bottleneck_plain

from .lamda_models import OUT, RANK, Conv1DBlock, D, adapted, batch, block, config, layers, learn, llama, rows

MODELS = {"linear": block, "conv1d": Conv1DBlock}


def targets(kind: str) -> dict[str, Any]:
    return {} if kind == "linear" else {"target_modules": ["up"]}


def layer_of(kind: str = "linear", **given: Any) -> LaMDALinear:
    """One layer that has learned something."""
    torch.manual_seed(0)
    model = adapted(MODELS[kind](), **{**targets(kind), **given})
    learn(model)
    return layers(model)[0]


def gradients(forward: Any, layer: LaMDALinear, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = forward(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).to(y.dtype)
    y.backward(dy)
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_model_is_unchanged_at_the_start(kind: str, svd: str) -> None:
    plain = MODELS[kind]()
    expected = plain(rows())
    model = adapted(plain, svd=svd, **targets(kind))
    assert torch.equal(model(rows()), expected)
    learn(model)
    assert not torch.allclose(model(rows()), expected)


def test_s_has_a_gradient_at_the_start_and_b_has_none() -> None:
    layer = layers(adapted())[0]
    layer(rows()).square().sum().backward()
    assert layer.memsave_lamda_S["default"].grad.abs().max() > 0
    assert all(not segment.grad.any() for segment in layer.segments("default"))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("frozen", [0, RANK // 2, RANK])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_same_as_the_reference(kind: str, frozen: int, alpha: float) -> None:
    layer = layer_of(kind, alpha=alpha)
    layer.freeze_rows("default", frozen)
    found = gradients(layer, layer, rows())
    assert sum("_B" in name for name in found) == 8 - layer.frozen_segments["default"]
    assert_same(found, gradients(layer.reference, layer, rows()))


def test_the_definition_itself() -> None:
    """Against y = x W^T + b + alpha ((x A) S) B written out."""
    layer = layer_of(alpha=3.0)
    a, s = layer.memsave_lamda_A["default"], layer.memsave_lamda_S["default"]
    b = torch.cat(layer.segments("default"))
    assert a.shape == (D, RANK) and s.shape == (RANK, RANK) and b.shape == (RANK, OUT)
    base, x = layer.base_layer, rows()
    expected = x @ base.weight.t() + base.bias + 3.0 * (((x @ a) @ s) @ b)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("own_y", [True, False])
@pytest.mark.parametrize("trained", ["all", "s", "late rows", "early rows", "b", "x"])
def test_gradcheck(own_y: bool, trained: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 5), (5, 4), (4, 4), (1, 6), (2, 6), (1, 6))]
    x, a, s, *segments = tensors
    weight = torch.randn(6, 5, dtype=torch.float64)
    need = {"all": (0, 2, 3, 4, 5), "s": (2,), "late rows": (0, 2, 5), "early rows": (3, 5), "b": (3, 4, 5), "x": (0,)}
    for i in need[trained]:
        tensors[i].requires_grad_()

    def run(add: Any, x: Tensor, s: Tensor, *segments: Tensor) -> Tensor:
        return add(x @ weight.t(), x, a, s, segments, 1.5)

    fast = partial(run, partial(add_bottleneck, own_y=own_y))
    assert torch.autograd.gradcheck(fast, (x, s, *segments))
    torch.testing.assert_close(fast(x, s, *segments), run(add_bottleneck_plain, x, s, *segments))


def test_second_derivatives_raise() -> None:
    layer, x = layer_of(), rows().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice through a function of memsave"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_keeps_n_times_r_elements_and_nothing_else(kind: str, autocast: bool) -> None:
    layer, x = layer_of(kind, freeze_until=0.3), rows().requires_grad_()
    dtype = torch.bfloat16 if autocast else torch.float32

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return layer(x)

    # Under autocast torch keeps its own copy of the frozen base weight for dx; LaMDA keeps A, S and B themselves.
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = memsave.saved_bytes(lambda: layer.base_layer(x))
    for due in (0, RANK // 2, RANK):
        layer.freeze_rows("default", due)
        kept = memsave.saved_bytes(forward) - base
        assert kept == x.shape[0] * x.shape[1] * RANK * dtype.itemsize
        assert kept == layer.kept_bytes(tuple(x.shape), dtype)
    layer.memsave_lamda_S["default"].requires_grad_(False)
    assert memsave.saved_bytes(forward) - base == 0 == layer.kept_bytes(tuple(x.shape), dtype)


def test_the_base_output_is_written_into_only_where_nobody_holds_it() -> None:
    """A hook that keeps the base layer's output finds it as it was."""
    layer, x = layer_of(), rows()
    held: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, args, output: held.append(output))
    y = layer(x)
    assert torch.equal(held[0], nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias))
    assert not torch.allclose(held[0], y)


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_no_second_output_is_made(kind: str) -> None:
    """With a base output that may be written into, the peak is one N x O tensor, not two."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(512, 16) if kind == "conv1d" else nn.Linear(16, 512, bias=kind == "linear"))
    adapted_model = peft.get_peft_model(model, config(r=2, target_modules=["0"]))
    layer, x = layers(adapted_model)[0], torch.randn(4, 64, 16)
    output_bytes = 4 * 64 * 512 * 4
    peak = memsave.measure(lambda: layer(x)).peak_bytes - memsave.measure(lambda: layer.base_layer(x)).peak_bytes
    assert peak < output_bytes / 2


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_without_gradients(mode: str) -> None:
    layer, x = layer_of().eval(), rows()
    expected = layer.reference(x).detach()
    with torch.no_grad() if mode == "no_grad" else torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


def test_several_active_adapters_add_up() -> None:
    model = adapted()
    model.add_adapter("other", config(r=5, alpha=2.0))
    learn(model)
    layer, x = layers(model)[0], rows()
    base = layer.base_layer(x)
    alone = []
    for name in ("default", "other"):
        layer.set_adapter(name)
        alone.append(layer(x) - base)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + alone[0] + alone[1])
    assert_same(gradients(layer, layer, x), gradients(layer.reference, layer, x))
    # The frozen base keeps nothing.
    assert memsave.saved_bytes(lambda: layer(x)) == layer.kept_bytes(tuple(x.shape), x.dtype) == 10 * (RANK + 5) * 4


def test_disabled_adapters_run_the_base() -> None:
    model = adapted()
    learn(model)
    with model.disable_adapter():
        assert torch.equal(model(rows()), block()(rows()))
    assert not torch.equal(model(rows()), block()(rows()))


@pytest.mark.parametrize("kind", MODELS)
def test_merged_equals_unmerged_and_unmerge_is_exact(kind: str) -> None:
    model = adapted(MODELS[kind](), alpha=1.5, **targets(kind)).eval()
    model.add_adapter("other", config(r=3, **targets(kind)))
    learn(model)
    model.base_model.set_adapter(["default", "other"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    objects = [layer.base_layer.weight for layer in layers(model)]
    expected = model(rows())
    model.merge_adapter()
    torch.testing.assert_close(model(rows()), expected)
    assert all(layer.merged_adapters == ["default", "other"] for layer in layers(model))
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(layer.base_layer.weight is old for layer, old in zip(layers(model), objects, strict=True))
    torch.testing.assert_close(model(rows()), expected)
    weight = layers(model)[0].base_layer.weight
    delta = sum(layers(model)[0].get_delta_weight(name) for name in ("default", "other"))
    plain = model.merge_and_unload()
    assert not layers(plain)
    torch.testing.assert_close(plain.up.weight, weight + delta)
    torch.testing.assert_close(plain(rows()), expected)


def test_unmerge_is_exact_in_bfloat16_and_after_a_cast() -> None:
    model = adapted(block(torch.bfloat16))
    learn(model)
    before = [layer.base_layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert any(not torch.equal(layer.base_layer.weight, w) for layer, w in zip(layers(model), before, strict=True))
    model.float()
    model.unmerge_adapter()
    for layer, weight in zip(layers(model), before, strict=True):
        assert layer.base_layer.weight.dtype == torch.float32
        assert torch.equal(layer.base_layer.weight, weight.float())


def test_an_adapter_that_comes_while_another_is_merged_is_of_the_unmerged_weight() -> None:
    model = adapted()
    learn(model)
    model.merge_adapter()
    model.add_adapter("other", config(r=3))
    layer = layers(model)[0]
    a, fresh = layer.memsave_lamda_A["other"], layers(adapted(r=3))[0].memsave_lamda_A["default"]
    assert torch.equal(a, fresh)


def test_tied_weights_keep_their_values_under_merge() -> None:
    torch.manual_seed(0)
    model = block()
    model.table = nn.Embedding(OUT, D)
    model.table.weight = model.up.weight
    tuned = adapted(model)
    learn(tuned)
    values = model.table.weight.clone()
    tuned.merge_adapter()
    assert torch.equal(model.table.weight, values)
    assert not torch.equal(layers(tuned)[0].base_layer.weight, values)
    tuned.unmerge_adapter()
    assert layers(tuned)[0].base_layer.weight is model.table.weight


def test_safe_merge_refuses_what_is_not_finite() -> None:
    model = adapted()
    learn(model)
    layer = layers(model)[0]
    weight = layer.base_layer.weight
    with torch.no_grad():
        layer.memsave_lamda_S["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter\\(s\\) default"):
        model.merge_adapter(safe_merge=True)
    assert layer.base_layer.weight is weight and not layer.merged


def test_segments_frozen_by_the_schedule_stay_frozen_whatever_peft_does() -> None:
    model = adapted()
    model.add_adapter("other", config())
    for layer in layers(model):
        layer.freeze_rows("default", RANK // 2)

    def assert_frozen() -> None:
        for layer in layers(model):
            flags = [p.requires_grad for p in layer.segments("default")]
            assert flags[: layer.frozen_segments["default"]] == [False] * 4 and len(flags) == 8

    assert_frozen()
    assert all(p.requires_grad for layer in layers(model) for p in layer.segments("default")[4:])
    for do in (
        lambda: model.set_adapter("other"),
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_adapter(["default", "other"]),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.set_requires_grad("default"),
        lambda: model.add_adapter("third", config()),
        lambda: model.delete_adapter("other"),
        lambda: model.set_adapter("default"),
    ):
        do()
        assert_frozen()
    assert all(p.requires_grad for layer in layers(model) for p in layer.segments("default")[4:])


def test_delete_adapter_leaves_nothing_of_it() -> None:
    model = adapted()
    model.add_adapter("other", config(r=3))
    assert any("other" in name for name in model.state_dict())
    model.delete_adapter("other")
    assert not any("other" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    assert all("other" not in getattr(layer, name) for layer in layers(model) for name in layer.other_param_names)


@pytest.mark.parametrize("adapter_dtype", [None, "float32"])
def test_autocast_and_mixed_dtypes(adapter_dtype: str | None) -> None:
    """bf16 base: the output and x's gradient are bf16; gradients of the adapter have its own dtype."""
    layer = layer_of(dtype=adapter_dtype) if adapter_dtype else layer_of()
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(layer, layer, rows())
        expected = gradients(layer.reference, layer, rows())
    assert found["y"].dtype == torch.bfloat16 and found["x"].dtype == torch.float32
    assert_same(found, expected, rtol=0.05, atol=0.05)
    exact = gradients(layer, layer, rows())
    assert_same({k: v.float() for k, v in found.items()}, exact, rtol=0.1, atol=0.15)

    low = layers(adapted(block(torch.bfloat16), dtype=adapter_dtype))[0]
    learn(low)
    found = gradients(low, low, rows(dtype=torch.bfloat16))
    assert found["y"].dtype == found["x"].dtype == torch.bfloat16
    dtypes = {v.dtype for name, v in found.items() if "memsave" in name}
    assert dtypes == {torch.float32 if adapter_dtype else torch.bfloat16}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    layer = layer_of()
    expected = gradients(layer, layer, rows())
    found = gradients(lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer, rows())
    assert_same(found, expected, rtol=0, atol=0)


def test_selective_checkpointing_that_caches_products() -> None:
    """Its cache holds the base layer's output, which must not be written into."""
    layer = layer_of()

    def products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        save = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, products)
    expected = gradients(layer, layer, rows())
    found = gradients(lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=contexts), layer, rows())
    assert_same(found, expected, rtol=0, atol=0)


def test_estimate_predicts_what_is_measured() -> None:
    model = adapted(llama(), r=8, target_modules="all-linear")

    def step() -> None:
        model.zero_grad()
        model(**batch()).loss.backward()

    step()
    measured = memsave.measure(step).peak_bytes
    predicted = memsave.estimate(model, batch()).peak_bytes
    assert predicted == pytest.approx(measured, rel=0.1)


def test_peft_makes_a_lora_of_it() -> None:
    """One of the same rank, r, computes the same."""
    from peft import LoraConfig, convert_to_lora

    model = adapted()
    learn(model)
    lora, weights = convert_to_lora(model, rank=RANK)
    assert isinstance(lora, LoraConfig)
    plain = peft.get_peft_model(block(), lora)
    peft.set_peft_model_state_dict(plain, weights)
    torch.testing.assert_close(plain(rows()), model(rows()), rtol=1e-4, atol=1e-4)


def test_freezing_reaches_a_compiled_layer() -> None:
    layer = layer_of()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients(compiled, layer, rows())
    layer.freeze_rows("default", RANK)
    assert_same(gradients(compiled, layer, rows()), gradients(layer, layer, rows()))


@pytest.mark.parametrize("kind", MODELS)
def test_compiles_into_one_graph(kind: str) -> None:
    layer = layer_of(kind)
    layer.freeze_rows("default", RANK // 2)
    expected = gradients(layer, layer, rows())
    torch._dynamo.reset()
    assert_same(gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"), layer, rows()), expected)


def test_composes_with_converted_linears() -> None:
    """bare convert before and after: the converted base runs, LaMDA's gradients are the same."""
    plain = adapted()
    learn(plain)
    expected = gradients(plain, plain, rows())
    after = copy.deepcopy(plain)
    memsave.convert_model(after)
    assert type(layers(after)[0].base_layer).__name__ == "MemsaveLinear"
    assert_same(gradients(after, after, rows()), expected)
    converted = block()
    memsave.convert_model(converted)
    before = adapted(converted)
    learn(before)
    assert_same(gradients(before, before, rows()), expected)


def test_survives_copies_and_pickles() -> None:
    layer = layer_of()
    x = rows()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.frozen_segments == layer.frozen_segments


def test_repr_says_rank_and_frozen_rows() -> None:
    layer = layer_of()
    layer.freeze_rows("default", 8)
    assert "default: r=12, alpha=1, frozen 7 of 12 rows" in repr(layer)
