"""`saved_bytes`: exact small cases, by hand."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memsave.memory import measure, saved_bytes

from .helpers import FLOAT_BYTES, hook_state

ROWS, WIDE, NARROW = 5, 16, 8
INPUT_BYTES = ROWS * NARROW * FLOAT_BYTES
HIDDEN_BYTES = ROWS * WIDE * FLOAT_BYTES


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(NARROW, WIDE), nn.ReLU(), nn.Linear(WIDE, 4))


@pytest.mark.parametrize("count", [saved_bytes, measure])
def test_a_result_instead_of_a_function_is_an_error(count: Callable[..., object]) -> None:
    with pytest.raises(TypeError, match="expected a function without arguments, such as lambda.*, got Tensor"):
        count(torch.zeros(1))


def test_linear_relu_chain_keeps_its_input_and_one_hidden_tensor() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)
    assert saved_bytes(lambda: model(x)) == INPUT_BYTES + HIDDEN_BYTES


def test_nothing_is_kept_without_gradients() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)
    with torch.no_grad():
        assert saved_bytes(lambda: model(x)) == 0


def test_a_frozen_linear_does_not_keep_its_input() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)
    model[0].requires_grad_(False)
    assert saved_bytes(lambda: model(x)) == HIDDEN_BYTES


def test_with_backward_it_is_the_most_held_at_once() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)

    def one_by_one() -> None:
        for _ in range(3):
            model(x).sum().backward()

    def two_together() -> None:
        first, second = model(x), model(x)
        (first.sum() + second.sum()).backward()

    assert saved_bytes(one_by_one) == INPUT_BYTES + HIDDEN_BYTES
    assert saved_bytes(two_together) == INPUT_BYTES + 2 * HIDDEN_BYTES


def test_two_backwards_of_one_graph() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)

    def fn() -> None:
        loss = model(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    assert saved_bytes(fn) == INPUT_BYTES + HIDDEN_BYTES


def test_a_storage_counts_once_and_in_full() -> None:
    base = torch.randn(100, requires_grad=True)

    def fn() -> list[Tensor]:
        parts = base[:10], base[50:60]
        return [parts[0] * parts[1], parts[0].exp().sum(), base.sin()]

    exp_bytes = 10 * FLOAT_BYTES
    assert saved_bytes(fn) == 100 * FLOAT_BYTES + exp_bytes


def test_a_storage_is_kept_until_its_last_handle_is_freed() -> None:
    x, y = torch.randn(7, requires_grad=True), torch.randn(10, requires_grad=True)

    def fn() -> list[Tensor]:
        first, second = x.sin(), x.cos()
        del first
        return [second, y.sin()]

    assert saved_bytes(fn) == measure(fn).saved_bytes == 17 * FLOAT_BYTES

    def one_by_one() -> Tensor:
        first, second = x.sin(), x.cos()
        del first, second
        return y.sin()

    assert saved_bytes(one_by_one) == measure(one_by_one).saved_bytes == 10 * FLOAT_BYTES


def test_an_expanded_tensor_counts_as_what_it_holds() -> None:
    row, x = torch.randn(1, NARROW), torch.randn(ROWS, NARROW, requires_grad=True)
    assert saved_bytes(lambda: x * row.expand(ROWS, NARROW)) == NARROW * FLOAT_BYTES


class UsesWeightEarly(nn.Module):
    """Reads a child's weight through a view before the child has run, as tied heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(NARROW, NARROW, bias=False)
        self.register_buffer("scale", torch.ones(NARROW))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner((x @ self.inner.weight.t().detach().requires_grad_()) * self.scale)


def test_parameters_and_buffers_of_modules_that_run_are_left_out() -> None:
    model, x = UsesWeightEarly(), torch.randn(ROWS, NARROW)
    # Kept: x for the detached view's gradient, and the input of the inner linear.
    assert saved_bytes(lambda: model(x)) == 2 * INPUT_BYTES


def test_a_weight_used_before_its_module_runs_is_left_out() -> None:
    linear, x = nn.Linear(NARROW, NARROW, bias=False), torch.randn(ROWS, NARROW, requires_grad=True)
    x_bytes = x_again_bytes = INPUT_BYTES
    assert saved_bytes(lambda: linear(x @ linear.weight)) == x_bytes + x_again_bytes


def test_a_weight_of_no_module_that_runs_is_counted() -> None:
    weight, x = nn.Parameter(torch.randn(NARROW, NARROW)), torch.randn(ROWS, NARROW, requires_grad=True)
    assert saved_bytes(lambda: x @ weight) == INPUT_BYTES + NARROW * NARROW * FLOAT_BYTES


def test_parameters_that_a_lazy_module_makes_while_it_runs_are_left_out() -> None:
    linear, x = nn.LazyLinear(4), torch.randn(ROWS, NARROW, requires_grad=True)
    assert saved_bytes(lambda: linear(x)) == INPUT_BYTES


def test_a_cast_copy_of_a_weight_is_counted() -> None:
    model, x = nn.Linear(NARROW, WIDE, bias=False), torch.randn(ROWS, NARROW, requires_grad=True)

    def fn() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert saved_bytes(fn) == (ROWS * NARROW + NARROW * WIDE) * torch.bfloat16.itemsize


def test_sparse_tensors_count_indices_and_values() -> None:
    sparse, x = torch.eye(ROWS).to_sparse(), torch.randn(ROWS, 3, requires_grad=True)
    assert saved_bytes(lambda: torch.sparse.mm(sparse, x)) == ROWS * (2 * 8 + FLOAT_BYTES)


def test_jagged_tensors_count_values_and_offsets() -> None:
    parts = [torch.ones(2, NARROW), torch.ones(3, NARROW)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    offsets_bytes = 3 * 8
    exp_bytes = 5 * NARROW * FLOAT_BYTES
    assert saved_bytes(lambda: jagged.exp()) == exp_bytes + offsets_bytes


@pytest.mark.parametrize("context", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_tensors_without_data_count_as_if_real(context) -> None:
    with context():
        model, x = mlp(), torch.randn(ROWS, NARROW)
        assert saved_bytes(lambda: model(x).sum().backward()) == INPUT_BYTES + HIDDEN_BYTES


def test_checkpoint_counts_its_inputs() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW, requires_grad=True)
    assert saved_bytes(lambda: checkpoint(model, x, use_reentrant=False)) == INPUT_BYTES
    assert saved_bytes(lambda: checkpoint(model, x, use_reentrant=True)) == INPUT_BYTES
    recomputed = saved_bytes(lambda: checkpoint(model, x, use_reentrant=True).sum().backward())
    assert recomputed == INPUT_BYTES + HIDDEN_BYTES


def test_offloaded_tensors_do_not_count() -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)

    def fn() -> None:
        with torch.autograd.graph.save_on_cpu():
            out = model(x)
        out.sum().backward()

    assert saved_bytes(fn) == 0


def test_a_custom_function_counts_what_it_saves() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(torch.zeros(3), x)
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            extra, x = ctx.saved_tensors
            assert extra.shape == (3,)
            return 2 * dy

    x = torch.randn(7, requires_grad=True)
    assert saved_bytes(lambda: Double.apply(x).sum().backward()) == 10 * FLOAT_BYTES


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # says that our hooks run once more
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module(backend: str) -> None:
    model, x = mlp(), torch.randn(ROWS, NARROW)
    compiled = torch.compile(model, backend=backend)
    assert saved_bytes(lambda: compiled(x).sum().backward()) == INPUT_BYTES + HIDDEN_BYTES
    torch._dynamo.reset()


def modify_output(x: Tensor) -> Tensor:
    y = x.exp()
    y.add_(1)
    return y.sum()


def modify_input(x: Tensor) -> Tensor:
    y = 2 * x
    loss = (y * y).sum()
    y.zero_()
    return loss


def modify_leaf(x: Tensor) -> Tensor:
    loss = (x * x).sum()
    with torch.no_grad():
        x.zero_()
    return loss


def modify_view(x: Tensor) -> Tensor:
    y = 2 * x
    loss = (y * y).sum()
    y.detach()[0] = 1
    return loss


@pytest.mark.parametrize("modify", [modify_output, modify_input, modify_leaf, modify_view])
def test_modification_in_place_raises_as_without_the_measurement(modify) -> None:
    def fn() -> None:
        modify(torch.randn(3, requires_grad=True)).backward()

    for run in (fn, lambda: saved_bytes(fn)):
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            run()


def test_gradients_and_second_gradients_are_unchanged() -> None:
    model, x = nn.Sequential(nn.Linear(NARROW, WIDE), nn.Tanh()).double(), torch.randn(ROWS, NARROW).double()

    def gradients() -> list[Tensor]:
        first = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), model[0].weight)[0]
        return [first.detach(), second]

    plain, measured = gradients(), []
    saved_bytes(lambda: measured.extend(gradients()))
    assert all(torch.equal(a, b) for a, b in zip(plain, measured, strict=True))


def test_saved_outputs_are_freed_without_the_garbage_collector() -> None:
    alive = []

    def fn() -> None:
        y = torch.ones(3, requires_grad=True).sigmoid()  # saves its own output
        storage = weakref.ref(y.untyped_storage())
        del y
        alive.append(storage() is not None)

    gc.disable()
    try:
        saved_bytes(fn)
    finally:
        gc.enable()
    assert alive == [False]


def test_a_graph_that_outlives_the_measurement_still_works() -> None:
    x, kept = torch.ones(3, requires_grad=True), []
    assert saved_bytes(lambda: kept.append(x.exp().sum())) == 3 * FLOAT_BYTES
    kept[0].backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_hooks_are_gone_after_an_error() -> None:
    before = hook_state()

    def fn() -> None:
        mlp()(torch.randn(ROWS, NARROW))
        raise KeyError("from fn")

    with pytest.raises(KeyError, match="from fn"):
        saved_bytes(fn)
    assert hook_state() == before
