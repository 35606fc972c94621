"""SHiRA trains what dense training with masked gradients trains, bit for bit where nothing is rounded differently."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.nn.masked_values import Masked, with_gradient_of_values

from .shira import (
    LINEARS,
    OUT,
    ROWS,
    RUNS,
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
    upstream,
    values,
    weights,
)

F64 = torch.float64
linears = pytest.mark.parametrize("kind", LINEARS)


def close(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-12) -> None:
    assert len(actual) == len(expected) > 1
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05, weight_decay=0)


@linears
def test_training_is_dense_training_with_masked_gradients(kind: str) -> None:
    torch.manual_seed(0)
    plain = LINEARS[kind]().double()
    start = plain.weight.detach().clone()
    _, layer = one(copy.deepcopy(plain), trained=False)
    mask = torch.zeros(start.numel(), dtype=torch.bool)
    mask[indices(layer)] = True
    mask = mask.view_as(start)
    plain.weight.register_hook(lambda grad: grad * mask)
    ours = [layer.memsave_shira_values["default"]]
    if plain.bias is not None:
        ours.append(layer.base_layer.bias.requires_grad_())
    optimizers = adamw(ours), adamw(plain.parameters())
    for step in range(8):
        x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(step), dtype=F64)
        for module, optimizer in zip((layer, plain), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).tanh().square().sum().backward()
            optimizer.step()
    held = layer.base_layer.weight.detach()
    assert (held - start)[mask].abs().min() > 1e-3
    torch.testing.assert_close(held, plain.weight.detach(), rtol=0, atol=1e-12)
    assert torch.equal(held[~mask], start[~mask])
    if plain.bias is not None:
        torch.testing.assert_close(layer.base_layer.bias, plain.bias, rtol=0, atol=1e-12)


@linears
def test_gradients_are_those_of_the_reference(kind: str) -> None:
    torch.manual_seed(0)
    model, layer = one(LINEARS[kind]().double())
    x = torch.randn(3, 5, WIDTH, dtype=F64)
    close(gradients(model, model, x), gradients(layer.reference, model, x))
    torch.testing.assert_close(layer(x), layer.reference(x), rtol=0, atol=1e-12)


@linears
@pytest.mark.parametrize("of", ["input", "values"])
def test_gradcheck(kind: str, of: str) -> None:
    torch.manual_seed(0)
    _, layer = one(LINEARS[kind]().double(), density=0.1)
    x = torch.randn(2, 3, WIDTH, dtype=F64, requires_grad=of == "input")

    def run(_: Tensor) -> Tensor:
        layer.held.sync(force=of == "values")  # gradcheck changes values behind their version counter
        return layer(x)

    assert torch.autograd.gradcheck(run, x if of == "input" else layer.memsave_shira_values["default"])


def test_two_active_adapters_with_overlapping_masks() -> None:
    torch.manual_seed(0)
    model, layer = one(nn.Linear(WIDTH, OUT).double(), density=0.5)
    model.add_adapter("other", config(density=0.5, seed=1))
    randomize(model, "other", seed=9)
    model.base_model.set_adapter(["default", "other"])
    layer.set_scale("other", -0.75)
    shared = set(indices(layer).tolist()) & set(indices(layer, "other").tolist())
    assert 0 < len(shared) < 48
    x = torch.randn(5, WIDTH, dtype=F64)
    ours = gradients(model, model, x)
    assert len(ours) == 3
    close(ours, gradients(layer.reference, model, x))
    assert not torch.allclose(ours[1], ours[2])

    optimizer = adamw([*values(model), *values(model, "other")])
    optimizer.step()
    expected = layer.reference(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.base_layer(x), expected, rtol=0, atol=1e-12)
    model.set_adapter("default")
    torch.testing.assert_close(model(x), layer.reference(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_step_reaches_the_weight_at_once(optimizer: Any) -> None:
    model, layer = one(nn.Linear(WIDTH, OUT))
    original = layer.held.original_weight().flatten()[indices(layer)]
    x = torch.randn(5, WIDTH)
    stepper = optimizer(values(model), lr=0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        stepper.step()
        held = layer.base_layer.weight.detach().flatten()[indices(layer)]
        assert torch.equal(held, original + layer.memsave_shira_values["default"].detach())
        with torch.no_grad():
            assert torch.equal(model(x), layer.base_layer(x))


def test_values_written_by_hand_are_noticed_by_an_eager_forward() -> None:
    model, layer = one(nn.Linear(WIDTH, OUT))
    x = torch.randn(5, WIDTH)
    with torch.no_grad():
        layer.memsave_shira_values["default"].add_(1.0)
        torch.testing.assert_close(model(x), layer.reference(x))


def three_steps(model: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    optimizer = adamw(values(model))
    seen = []
    for step in range(3):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
        y = run(x)
        optimizer.zero_grad()
        y.square().sum().backward()
        optimizer.step()
        seen += [y.detach(), *(p.detach().clone() for p in values(model))]
        with torch.no_grad():
            seen.append(run(x))  # what was stepped is in force
    return seen


def test_compiled_training_is_eager_training_bit_for_bit() -> None:
    torch.manual_seed(0)
    eager = adapted(Toy())
    graph = copy.deepcopy(eager)
    expected, actual = three_steps(eager, eager), three_steps(graph, compiled(graph))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not torch.equal(expected[0], expected[6])


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
@pytest.mark.parametrize("run", ["reentrant", "non-reentrant"])
def test_checkpointing_replays_the_same(run: str, keep_ratio: float) -> None:
    torch.manual_seed(0)
    model = adapted(Toy(), keep_ratio=keep_ratio)
    x = torch.randn(60, WIDTH)

    def seeded(run: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: (torch.manual_seed(5), run(model, x))[1]

    plain, replayed = (gradients(seeded(RUNS[name]), model, x) for name in ("eager", run))
    assert len(plain) == 5 and all(torch.equal(a, b) for a, b in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_autocast(kind: str) -> None:
    torch.manual_seed(0)
    model, layer = one(LINEARS[kind]())
    x = torch.randn(40, WIDTH)
    expected = gradients(layer.reference, model, x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer.base_layer(x))
        actual = gradients(model, model, x)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0, atol=0.02 * float(e.abs().max()))


@linears
def test_sampled_gradients_are_unbiased_and_follow_the_seed(kind: str) -> None:
    torch.manual_seed(0)
    model, layer = one(LINEARS[kind](), keep_ratio=0.4, density=0.2)
    x = torch.randn(50, WIDTH) * torch.linspace(0.5, 2, 50)[:, None]
    model.eval()
    exact = gradients(model, model, x)
    model.train()
    draws = []
    for seed in range(300):
        torch.manual_seed(seed)
        draws.append(gradients(model, model, x))
    assert all(torch.equal(draw[0], exact[0]) for draw in draws)  # the input's gradient is exact
    sampled = torch.stack([draw[1] for draw in draws]).double()
    error = sampled.std(0) / len(draws) ** 0.5
    assert sampled.std(0).min() > 0
    assert ((sampled.mean(0) - exact[1]).abs() < 4 * error).all()
    torch.manual_seed(7)
    assert torch.equal(gradients(model, model, x)[1], draws[7][1])
    assert not torch.equal(draws[6][1], draws[7][1])


def test_siblings_share_one_sample() -> None:
    """With equal upstream gradients and full masks, q, k and v get the same estimate; a linear elsewhere does not."""
    torch.manual_seed(0)
    model = adapted(Toy(), keep_ratio=0.5, density=1.0, trained=False)
    q, k, v, out = layers(model)
    x = torch.randn(60, WIDTH)
    (q(x) + k(x) + v(x) + out(x * 1)).backward(torch.randn(60, WIDTH))
    first, *others, elsewhere = (p.grad for p in values(model))
    assert first is not None and all(torch.equal(first, other) for other in others)
    assert not torch.allclose(first, elsewhere)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_is_not_finite_shows_in_the_sampled_gradient(kind: str, bad: float) -> None:
    """Whether its row is drawn or not: in the entries of its column of x, or of dy, and in no others."""
    torch.manual_seed(0)
    model, layer = one(LINEARS[kind](), keep_ratio=0.3, density=0.5)
    first, second = indices(layer) // layer.weight_shape[1], indices(layer) % layer.weight_shape[1]
    of_dy, of_x = (second, first) if layer.transposed else (first, second)
    for seed in range(6):
        torch.manual_seed(seed)
        x, dy = torch.randn(60, WIDTH), torch.randn(60, OUT)
        dy[41, 3] = bad
        model.zero_grad()
        model(x).backward(dy)
        grad = layer.memsave_shira_values["default"].grad
        assert torch.equal(grad.isfinite(), of_dy != 3)
        x, dy = torch.randn(60, WIDTH), torch.randn(60, OUT)
        x[::2, 2] = bad  # more rows than are drawn, so that row 41 is not always among them
        x[41, 5] = bad
        model.zero_grad()
        model(x).backward(dy)
        grad = layer.memsave_shira_values["default"].grad
        assert torch.equal(grad.isfinite(), (of_x != 2) & (of_x != 5))


@pytest.mark.parametrize("run", RUNS)
def test_rows_of_x_and_dy_are_paired(run: str) -> None:
    """With x diagonal and dy the row number, the gradient of entry i is scale_i * x_ii * i, or 0 if not drawn."""
    n = 48
    torch.manual_seed(5)
    model, layer = one(nn.Linear(n, 1), keep_ratio=0.5, density=1.0, trained=False)
    sizes, numbers = torch.linspace(1, 3, n), torch.arange(1.0, n + 1)
    x = torch.diag(sizes).requires_grad_()
    RUNS[run](model, x).backward(numbers[:, None])
    grad = layer.memsave_shira_values["default"].grad
    assert grad is not None
    drawn = grad != 0
    assert drawn.sum() == n // 2
    inclusion = memsave.ops.row_inclusion(sizes, n // 2)
    torch.testing.assert_close((grad / (sizes * numbers))[drawn], 2.0**32 / inclusion[drawn].float())


def test_evaluation_does_not_sample() -> None:
    torch.manual_seed(0)
    model, layer = one(nn.Linear(WIDTH, OUT), keep_ratio=0.3)
    x = torch.randn(60, WIDTH)
    model.eval()
    state = torch.get_rng_state()
    ours = gradients(model, model, x)
    assert torch.equal(torch.get_rng_state(), state)
    close(ours, gradients(layer.reference, model, x), atol=1e-3)


def test_gradients_accumulate() -> None:
    torch.manual_seed(0)
    model, _ = one(nn.Linear(WIDTH, OUT).double())
    x = torch.randn(10, WIDTH, dtype=F64)
    whole = gradients(model, model, x)[1]
    model.zero_grad()
    dy = upstream(model(x))
    for part in (slice(0, 3), slice(3, 10)):
        model(x[part]).backward(dy[part])
    torch.testing.assert_close(values(model)[0].grad, whole, rtol=0, atol=1e-12)


class Inplace(nn.Module):
    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.lin, self.act = nn.Linear(WIDTH, OUT), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lin(x)) * 2


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
def test_the_output_may_be_modified_in_place(run: str, keep_ratio: float) -> None:
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = adapted(Inplace(inplace), keep_ratio=keep_ratio)
        x = torch.randn(40, WIDTH)
        torch.manual_seed(1)
        found.append(gradients(lambda x, m=model: RUNS[run](m, x), model, x))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivatives_raise() -> None:
    model, _ = one(nn.Linear(WIDTH, OUT))
    x = torch.randn(4, WIDTH, requires_grad=True)
    (grad,) = torch.autograd.grad(model(x).square().sum(), values(model), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiable once|twice|second"):
        grad.sum().backward()


def test_the_function_alone_gives_the_gradient_of_its_values() -> None:
    """`with_gradient_of_values` by gradcheck, scaled, on both layouts."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 4, dtype=F64, requires_grad=True), torch.randn(3, 4, dtype=F64)
    chosen = torch.tensor([0, 3, 5, 6, 11], dtype=torch.int32)
    values = torch.randn(5, dtype=F64, requires_grad=True)
    for transposed in (False, True):
        masked = Masked(chosen, transposed, 1.5)

        def run(x: Tensor, values: Tensor, masked: Masked = masked) -> Tensor:
            stored = (weight.t() if masked.transposed else weight).contiguous().flatten()
            stored = stored.index_add(0, masked.indices.long(), values.detach() * masked.scaling)
            w = stored.view(4, 3).t() if masked.transposed else stored.view(3, 4)
            return with_gradient_of_values(nn.Identity(), x, x @ w.t(), values, masked, None, None)

        assert torch.autograd.gradcheck(run, (x, values))


def test_frozen_values_get_no_gradient_and_keep_nothing() -> None:
    model, layer = one(nn.Linear(WIDTH, OUT))
    layer.memsave_shira_values["default"].requires_grad_(False)
    x = torch.randn(4, WIDTH, requires_grad=True)
    assert memsave.saved_bytes(lambda: model(x)) == 0 == layer.kept_bytes((4, WIDTH), torch.float32)
    model(x).sum().backward()
    assert layer.memsave_shira_values["default"].grad is None and x.grad is not None


def test_unmasked_entries_and_other_parameters_stay_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = peft_model = adapted(Toy(), target_modules=["q", "out"])
    before = weights(model)
    three_steps(peft_model, model)
    after = weights(model)
    for name, layer in (("q", layers(model)[0]), ("out", layers(model)[1])):
        changed = (after[f"{name}.weight"] != before[f"{name}.weight"]).flatten().nonzero().squeeze(1)
        assert torch.equal(changed, indices(layer))
    for name in before.keys() - {"q.weight", "out.weight"}:
        assert torch.equal(after[name], before[name])


def test_a_model_may_have_one_linear_twice() -> None:
    """One module under two names runs twice in a forward: its values get both gradients."""
    torch.manual_seed(0)
    shared = nn.Linear(WIDTH, WIDTH).double()
    model = adapted(nn.Sequential(OrderedDict(lin=shared, act=nn.Tanh())))
    (layer,) = layers(model)
    x = torch.randn(5, WIDTH, dtype=F64)
    close(
        gradients(lambda x: layer(layer(x).tanh()), model, x),
        gradients(lambda x: layer.reference(layer.reference(x).tanh()), model, x),
    )
