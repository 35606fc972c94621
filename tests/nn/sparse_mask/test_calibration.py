"""Masks by gradient against dense gradients, the memory that they take, and a model that stays as it was.

Weights (R, C); N samples of D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.nn.sparse_mask import gradient_masks, selection

from .calibrated import NAMES, Counting, Stop, data, failing, mlp, square, surroundings, weights_of
from .masks import assert_valid


def by_sorting(scores: Tensor, k: int) -> list[int]:
    values = scores.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


def dense_gradients(
    model: nn.Module, names: tuple[str, ...], batches: list[Any], loss: Callable[[Any], Tensor]
) -> dict[str, Tensor]:
    """What all gradients at once give."""
    weights = weights_of(model, names)
    sums = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    state = torch.get_rng_state()
    for batch in batches:
        output = model(**batch) if isinstance(batch, dict) else model(batch)
        gradients = torch.autograd.grad(loss(output), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            sums[name] += gradient
    torch.set_rng_state(state)
    return sums


@pytest.mark.parametrize("score", ["gradient", "snip"])
@pytest.mark.parametrize("budget_bytes", [None, 0, 10**9])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_mlp_against_dense_gradients(score: str, budget_bytes: int | None, dropout: float) -> None:
    model, batches = mlp(dropout), data()
    sums = dense_gradients(model, NAMES, batches, square)
    counts = dict(zip(NAMES, (17, 1, 24), strict=True))
    masks = gradient_masks(
        model, weights_of(model), counts, batches, loss=square, score=score, budget_bytes=budget_bytes
    )
    assert list(masks) == list(NAMES)
    for name in NAMES:
        weight = model.get_parameter(name).detach()
        scores = (sums[name] * weight if score == "snip" else sums[name]).abs()
        assert_valid(masks[name], counts[name], weight.numel())
        assert masks[name].tolist() == by_sorting(scores, counts[name])


@pytest.mark.parametrize("score", ["gradient", "snip"])
def test_llama_against_dense_gradients(score: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config).double()
    names = tuple(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = tuple(f"{name}.weight" for name in names)
    assert len(names) == 15
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(32, (2, 3, 12))]
    sums = dense_gradients(model, names, batches, lambda output: output.loss)
    counts = {name: model.get_parameter(name).numel() // 20 for name in names}
    masks = gradient_masks(model, weights_of(model, names), counts, batches, score=score)
    for name in names:
        scores = (sums[name] * model.get_parameter(name).detach() if score == "snip" else sums[name]).abs()
        assert masks[name].tolist() == by_sorting(scores, counts[name])


def test_gradients_are_summed_before_the_absolute_value_and_in_float32() -> None:
    model = nn.Linear(3, 1, bias=False).bfloat16()
    batches = [torch.tensor([[256.0, 10.0, 0.0]]), torch.tensor([[-256.0, 0.0, 0.0]])]
    batches += [torch.tensor([[1.0, 0.0, 0.0]])] + [torch.tensor([[0.0, 0.0, 256.0]])] + [torch.eye(3)[2:]] * 3
    batches = [batch.bfloat16() for batch in batches]
    masks = gradient_masks(model, {"w": model.weight}, {"w": 2}, batches, loss=Tensor.sum)
    assert masks["w"].tolist() == [1, 2]  # sums 1, 10, 259
    batches += [torch.tensor([[257.5 - 1, 0.0, 0.0]]).bfloat16()]  # 257: in bf16 the sum for column 2 would stay 256
    masks = gradient_masks(model, {"w": model.weight}, {"w": 1}, batches, loss=Tensor.sum)
    assert masks["w"].tolist() == [2]


def test_equal_scores_take_the_lowest_positions() -> None:
    model = nn.Linear(4, 3, bias=False)
    masks = gradient_masks(model, {"w": model.weight}, {"w": 5}, [torch.ones(2, 4)], loss=Tensor.sum)
    assert masks["w"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulators_of_one_layer_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ENTRIES_AT_ONCE_CPU", 2**15)  # what selection takes is not the question
    features, layers = 1024, 4
    model = Counting(layers, features).to(dtype)
    batches = [torch.randn(2, features, dtype=dtype) for _ in range(3)]
    weights = weights_of(model, tuple(f"layers.{i}.weight" for i in range(layers)))
    counts = dict.fromkeys(weights, 10)
    entries = features**2

    def peak_bytes(budget_bytes: int | None) -> int:
        profile = memsave.measure(
            lambda: gradient_masks(model, weights, counts, batches, loss=square, budget_bytes=budget_bytes)
        )
        return profile.peak_bytes - layers * entries * dtype.itemsize

    # One accumulator and one gradient beside it. Activations and the rest are less than a tenth of either.
    accumulator_bytes, gradient_bytes = 4 * entries, dtype.itemsize * entries
    least = accumulator_bytes + gradient_bytes
    assert least <= peak_bytes(None) < least + accumulator_bytes / 10
    assert model.passes == layers * len(batches)
    assert least + accumulator_bytes <= peak_bytes(2 * accumulator_bytes) < least + 1.1 * accumulator_bytes
    model.passes = 0
    gradient_masks(model, weights, counts, batches, loss=square, budget_bytes=2 * entries * 4)
    assert model.passes == layers // 2 * len(batches)


def test_a_gradient_goes_at_once() -> None:
    """With room for all accumulators, there are never two dense gradients beside them."""
    features, layers = 256, 6
    model = Counting(layers, features)
    seen: list[int] = []
    for layer in model.layers:
        layer.weight.register_hook(lambda g: seen.append(sum(x.weight.grad is not None for x in model.layers)))
    weights = weights_of(model, tuple(f"layers.{i}.weight" for i in range(layers)))
    gradient_masks(
        model, weights, dict.fromkeys(weights, 1), [torch.randn(2, features)] * 2, loss=square, budget_bytes=10**9
    )
    assert seen == [0] * layers * 2


def test_the_largest_weight_is_the_budget() -> None:
    model, batches = mlp(), data()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    gradient_masks(model, weights_of(model), dict.fromkeys(NAMES, 1), batches, loss=square)
    assert len(calls) == 3 * len(batches)  # 60, 80 and 24 entries: 80 is the budget, so 60 | 80 | 24
    calls.clear()
    names = ("2.weight", "0.weight", "4.weight")  # 80 | 60 + 24 is too much by four
    gradient_masks(model, weights_of(model, names), dict.fromkeys(names, 1), batches, loss=square)
    assert len(calls) == 3 * len(batches)
    calls.clear()
    gradient_masks(model, weights_of(model, names), dict.fromkeys(names, 1), batches, loss=square, budget_bytes=84 * 8)
    assert len(calls) == 2 * len(batches)


@pytest.mark.parametrize("failure", ["none", "loss", "later loss", "backward", "batches", "not finite"])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(failure: str, training: bool) -> None:
    model = mlp(0.5)
    model.insert(1, nn.BatchNorm1d(10).double())
    names = ("0.weight", "3.weight", "5.weight")
    model.train(training)
    model[0].eval()
    model[3].bias.requires_grad_(False)
    model[5].weight.requires_grad_(False)  # a frozen base
    model(data()[0]).sum().backward()
    kept = model[0].weight.grad
    stepped: list[int] = []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: stepped.append(1))
    before = surroundings(model)

    def batches() -> Iterator[Tensor]:
        yield from data(2)
        if failure == "batches":
            raise Stop
        yield torch.full((5, 6), float("inf"), dtype=torch.float64) if failure == "not finite" else data(3)[2]

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            return batches()

    losses = {"loss": failing(2), "later loss": failing(5)}
    handle = None
    if failure == "backward":

        def fail(gradient: Tensor) -> Tensor:
            raise Stop

        handle = model[3].weight.register_hook(fail) if model[3].weight.requires_grad else None
    try:
        with torch.no_grad():
            gradient_masks(
                model, weights_of(model, names), dict.fromkeys(names, 2), Batches(), loss=losses.get(failure, square)
            )
        assert failure == "none"
    except Stop:
        assert failure not in ("none", "not finite")
    except ValueError as error:
        assert failure == "not finite" and "0.weight" in str(error) and "not finite" in str(error)
    if handle is not None:
        handle.remove()
    assert surroundings(model) == before
    assert model[0].weight.grad is kept and not stepped
    model(data()[0]).sum().backward()
    assert stepped == [1] and model[3].weight.grad is not None and model[5].weight.grad is None


def test_it_runs_in_the_models_own_mode_with_the_callers_random_numbers() -> None:
    def masks(seed: int, training: bool) -> list[int]:
        model = mlp(0.5).train(training)
        torch.manual_seed(seed)
        found = gradient_masks(model, weights_of(model), dict.fromkeys(NAMES, 8), data(), loss=square)
        return [index for mask in found.values() for index in mask.tolist()]

    assert masks(1, True) == masks(1, True) != masks(2, True)
    assert masks(1, False) == masks(2, False) != masks(1, True)


class Output(SimpleNamespace):
    pass


class Scaled(nn.Module):
    """Takes its batch in several ways; gives a loss as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor, scale: float = 1.0, *, twice: bool = False) -> Any:
        return Output(loss=(self.linear(x) * scale * (2 if twice else 1)).square().sum())


def test_batches_of_every_kind() -> None:
    model = Scaled().double()
    weights, counts, (x, y, z) = {"w": model.linear.weight}, {"w": 4}, data()
    expected = gradient_masks(model, weights, counts, [x, 3 * y, 2 * z])["w"]
    batches = [x, (y, 3.0), {"x": z, "twice": True}]
    assert torch.equal(gradient_masks(model, weights, counts, batches)["w"], expected)
    assert torch.equal(gradient_masks(model, weights, counts, [x, [y, 3.0], batches[2]])["w"], expected)
    assert torch.equal(gradient_masks(model, weights, counts, (batch for batch in batches))["w"], expected)


def test_a_loader_gives_the_same_order_in_every_pass() -> None:
    model = mlp()
    loader = torch.utils.data.DataLoader(torch.cat(data(4)), batch_size=7, shuffle=True)
    orders: list[float] = []
    model.register_forward_pre_hook(lambda _, args: orders.append(float(args[0].sum())))
    state = torch.get_rng_state()
    gradient_masks(model, weights_of(model), dict.fromkeys(NAMES, 2), loader, loss=square)
    assert orders[:3] == orders[3:6] == orders[6:] and len(orders) == 9
    assert torch.equal(torch.get_rng_state(), state)


def test_checkpointing_and_shared_layers_add_up() -> None:
    """A weight that is used twice gets the sum of both; checkpointing changes nothing."""
    from torch.utils.checkpoint import checkpoint

    class Twice(nn.Module):
        def __init__(self, use_checkpoint: bool) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, dtype=torch.float64)
            self.use_checkpoint = use_checkpoint

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=False) if self.use_checkpoint else self.layer(x)
            return x

    masks = []
    for use_checkpoint in (False, True):
        torch.manual_seed(3)
        model = Twice(use_checkpoint)
        sums = dense_gradients(model, ("layer.weight",), data(), square)["layer.weight"]
        masks.append(gradient_masks(model, {"w": model.layer.weight}, {"w": 9}, data(), loss=square)["w"].tolist())
        assert masks[-1] == by_sorting(sums.abs(), 9)
    assert masks[0] == masks[1]


def test_sparse_gradients() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    batches = [torch.tensor([3, 7]), torch.tensor([7])]
    masks = gradient_masks(model, {"e": model.weight}, {"e": 6}, batches, loss=Tensor.sum)
    assert masks["e"].tolist() == [12, 13, 28, 29, 30, 31]


def test_a_converted_model() -> None:
    model = mlp()
    sums = dense_gradients(model, NAMES, data(), square)
    memsave.convert_model(model, memsave.RecomputeActivationConfig())
    masks = gradient_masks(model, weights_of(model), dict.fromkeys(NAMES, 7), data(), loss=square)
    assert {name: mask.tolist() for name, mask in masks.items()} == {n: by_sorting(sums[n].abs(), 7) for n in NAMES}


def test_no_weights_need_no_batches() -> None:
    assert gradient_masks(mlp(), {}, {}, []) == {}
