"""A converted linear beside the plain one: what stays exact, what is kept, and what non-finite values do.

x (N, D), dy (N, O), weight (O, D); k rows are kept.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

import memsave
from memsave import ops
from memsave.nn.rows import KeepRows

from .linears import ESTIMATORS, LAYERS, OUT, D, N, convert, grads, last_weight_grad, step_data


def assert_equal(a: Tensor, b: Tensor) -> None:
    """Bit for bit, NaN equal to NaN."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def sample_bytes(rows: int, itemsize: int = 4, *, noted: bool = False, width: int = D) -> int:
    """k rows with an index and a scale of 4 bytes each, and one more row that remembers non-finite values."""
    k = int(0.3 * rows)
    return 8 * k + ((0 if noted else k) + 1) * width * itemsize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@given(
    leading=st.lists(st.integers(0, 7), max_size=3),
    features=st.integers(1, 9),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    keep_ratio=st.floats(0.01, 1.0),
    min_rows=st.integers(1, 20),
    estimator=st.sampled_from(ESTIMATORS),
)
@settings(max_examples=60, deadline=None)
def test_everything_but_the_weight_gradient_is_exact(
    leading: list[int],
    features: int,
    outputs: int,
    bias: bool,
    dtype: torch.dtype,
    keep_ratio: float,
    min_rows: int,
    estimator: str,
) -> None:
    plain = nn.Sequential(nn.Linear(features, outputs, bias=bias)).to(dtype)
    model: Any = convert(plain, keep_ratio, estimator, min_rows)
    x, dy = torch.randn(*leading, features).to(dtype), torch.randn(*leading, outputs).to(dtype)
    assert_equal(model(x), plain(x))
    (dx, found), (exact_dx, exact) = grads(model, x, dy), grads(plain, x, dy)
    torch.testing.assert_close(dx, exact_dx)
    if bias:
        torch.testing.assert_close(found["0.bias"], exact["0.bias"])
    assert found["0.weight"].dtype == dtype and found["0.weight"].shape == exact["0.weight"].shape
    if KeepRows(keep_ratio, min_rows, estimator).num_rows(math.prod(leading)) == math.prod(leading):
        assert_equal(found["0.weight"], exact["0.weight"])
    inputs = x.requires_grad_()
    assert memsave.saved_bytes(lambda: model(inputs)) == model[0].kept_bytes(x.shape, dtype)


@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
@pytest.mark.parametrize("setting", [{"keep_ratio": 1.0}, {"keep_ratio": 0.1, "min_rows": N}])
def test_keeping_all_rows_is_the_plain_layer_bit_for_bit(layer: str, setting: dict[str, Any]) -> None:
    plain, (x, dy) = LAYERS[layer](), step_data()
    model = convert(plain, **setting)
    assert_equal(model(x), plain(x))
    (dx, found), (exact_dx, exact) = grads(model, x, dy), grads(plain, x, dy)
    assert_equal(dx, exact_dx)
    assert found.keys() == exact.keys()
    for name in exact:
        assert_equal(found[name], exact[name])


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck(layer: str) -> None:
    plain = LAYERS[layer]().double()
    x = torch.randn(3, 6, D, dtype=torch.float64, requires_grad=True)
    parameters = dict(plain.named_parameters())

    def run(model: nn.Module, names: list[str], x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, values, strict=True)), (x,))

    every = list(parameters)
    assert gradcheck(lambda *a: run(convert(plain, 1.0), every, *a), (x, *parameters.values()))
    others = [name for name in every if not (name.endswith("weight") and parameters[name].dim() == 2)]
    sampled = convert(plain, 0.3)
    assert gradcheck(lambda *a: run(sampled, others, *a), (x, *(parameters[name] for name in others)))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_seed_repeats_the_gradient_and_another_one_changes_it(layer: str) -> None:
    model, (x, dy) = convert(LAYERS[layer]()), step_data()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(last_weight_grad(model, x, dy))
    assert_equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_micro_batches_accumulate() -> None:
    model: Any = convert(LAYERS["Linear"]())
    x, dy = step_data()
    halves = list(zip(x.split(N // 2), dy.split(N // 2), strict=True))
    torch.manual_seed(0)
    apart = [grads(model, *half)[1]["0.weight"] for half in halves]
    torch.manual_seed(0)
    model.zero_grad()
    for half_x, half_dy in halves:
        model(half_x).backward(half_dy)
    assert_equal(model[0].weight.grad, apart[0] + apart[1])


class Siblings(nn.Module):
    """Three linears that read one tensor, or three copies of it."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, OUT) for _ in range(3))
        self.same = same

    def forward(self, x: Tensor) -> Tensor:
        read = [x, x, x] if self.same else [x.clone() for _ in range(3)]
        return torch.cat([linear(part) for linear, part in zip((self.q, self.k, self.v), read, strict=True)], dim=-1)


@pytest.mark.parametrize("same", [True, False])
def test_siblings_share_one_draw_and_one_copy_of_the_same_tensor_only(same: bool) -> None:
    model = convert(Siblings(same))
    x, dy = step_data()
    assert memsave.saved_bytes(lambda: model(x)) == sample_bytes(N) * (1 if same else 3)

    # Equal upstream gradients: the same draw gives the same dW.
    _, found = grads(model, x, torch.cat([dy, dy, dy], dim=-1))
    assert torch.equal(found["q.weight"], found["k.weight"]) == same
    assert torch.equal(found["q.weight"], found["v.weight"]) == same


def test_siblings_with_a_note_share_one_draw() -> None:
    model: Any = convert(nn.Sequential(nn.RMSNorm(D), Siblings(same=True)))
    x = step_data()[0].requires_grad_()
    copy_of_weight_bytes = D * 4
    norm_bytes = model[0].kept_bytes(x.shape, x.dtype)
    assert memsave.saved_bytes(lambda: model(x)) == norm_bytes + copy_of_weight_bytes + sample_bytes(N, noted=True)


def test_a_second_step_on_the_same_tensor_draws_anew() -> None:
    model, (x, dy) = convert(LAYERS["Linear"]()), step_data()
    assert not torch.equal(last_weight_grad(model, x, dy), last_weight_grad(model, x, dy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [10, 40, 100, 333])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
def test_kept_bytes(layer: str, rows: int, dtype: torch.dtype) -> None:
    model = convert(LAYERS[layer]().to(dtype), min_rows=12)
    x = torch.randn(rows, D, requires_grad=True).to(dtype)
    expected = sample_bytes(rows, dtype.itemsize) if rows > 12 else rows * D * dtype.itemsize
    assert memsave.saved_bytes(lambda: model(x)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_with_a_note_a_row_costs_eight_bytes(norm: type[nn.Module], dtype: torch.dtype) -> None:
    model: Any = convert(nn.Sequential(norm(D), nn.Linear(D, OUT)).to(dtype))
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    copies_bytes = sum(p.numel() * p.element_size() for p in model[0].parameters())
    expected = model[0].kept_bytes(x.shape, dtype) + copies_bytes + sample_bytes(N, dtype.itemsize, noted=True)
    assert memsave.saved_bytes(lambda: model(x)) == expected


@pytest.mark.parametrize(("activation", "frees"), [(nn.GELU, True), (nn.ReLU, False)])
def test_what_a_neighbour_keeps_too_is_not_freed(activation: type[nn.Module], frees: bool) -> None:
    plain = nn.Sequential(nn.Linear(D, D), activation(), nn.Linear(D, OUT))
    model = nn.Sequential(plain[0], plain[1], convert(nn.Sequential(plain[-1]))[0])
    x = step_data()[0]
    change = memsave.saved_bytes(lambda: model(x)) - memsave.saved_bytes(lambda: plain(x))
    assert change == sample_bytes(N) - (N * D * 4 if frees else 0)


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
def test_autocast(layer: str, backward_inside: bool) -> None:
    plain, (x, dy) = LAYERS[layer](), step_data()
    model: Any = convert(plain)
    exact = last_weight_grad(plain, x, dy)
    draws = []
    for _ in range(200):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            if backward_inside:
                y.backward(dy.bfloat16())
        if not backward_inside:
            y.backward(dy.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(y, plain(x))
        for parameter in model.parameters():
            assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        weight = model[-1].weight
        draws.append(weight.grad.t() if layer == "Conv1D" else weight.grad)
        model.zero_grad()
    found = torch.stack(draws)  # (R, OUT, D)
    standard_error = found.std(0) / len(draws) ** 0.5
    rounding = 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert ((found.mean(0) - exact).abs() < 4 * standard_error + rounding).all()


def test_autocast_keeps_rows_in_the_dtype_of_the_product() -> None:
    model, (x, _) = convert(LAYERS["Linear"]()), step_data()
    with torch.autocast("cpu", torch.bfloat16):
        assert memsave.saved_bytes(lambda: model(x)) == sample_bytes(N, 2)


def finite_alike(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name in exact:
        assert torch.equal(found[name].isfinite(), exact[name].isfinite()), name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_one_value_that_is_not_finite_is_never_hidden(layer: str, estimator: str, value: float) -> None:
    """At every position of x and of dy, in rows that are drawn or not; and nothing else becomes non-finite."""
    rows = 12
    plain = LAYERS[layer]()
    model = convert(plain, keep_ratio=0.25, estimator=estimator)
    clean = [part[:rows] for part in step_data()]
    for place in range(2):
        for position in range(clean[place].numel()):
            x, dy = (part.clone() for part in clean)
            (x, dy)[place].view(-1)[position] = value
            (dx, found), (exact_dx, exact) = grads(model, x, dy), grads(plain, x, dy)
            finite_alike(found, exact)
            torch.testing.assert_close(dx, exact_dx, equal_nan=True)
            bias = f"{len(model) - 1}.bias"
            torch.testing.assert_close(found[bias], exact[bias], equal_nan=True)
            if place == 1:
                output = position % OUT
                grad = found[f"{len(model) - 1}.weight"]
                assert not (grad[:, output] if layer == "Conv1D" else grad[output]).isfinite().any()
            elif layer != "noted":
                feature = position % D
                grad = found["0.weight"]
                assert not (grad[feature] if layer == "Conv1D" else grad[:, feature]).isfinite().any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_more_such_rows_than_are_drawn_are_not_hidden(layer: str, estimator: str, value: float) -> None:
    """A row that is not finite counts as the largest, but here every row is, each in one column of a few."""
    plain, (x, dy) = LAYERS[layer](), step_data()
    x[torch.arange(N), torch.arange(N) % (D - 1)] = value
    found = grads(convert(plain, keep_ratio=1 / N, estimator=estimator), x, dy)[1]
    finite_alike(found, grads(plain, x, dy)[1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_norm_that_makes_one_column_infinite_is_not_hidden(value: float) -> None:
    plain, (x, dy) = LAYERS["noted"](), step_data()
    with torch.no_grad():
        plain.get_parameter("0.weight")[3] = value
    found, exact = grads(convert(plain), x, dy)[1], grads(plain, x, dy)[1]
    finite_alike(found, exact)
    assert not found["1.weight"][:, 3].isfinite().any() and found["1.weight"][:, 4].isfinite().all()


def random_state_moves(fn: Any) -> bool:
    before = torch.get_rng_state()
    fn()
    return not torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("layer", LAYERS)
def test_evaluation_is_exact_and_free(layer: str) -> None:
    plain, (x, dy) = LAYERS[layer](), step_data()
    model = convert(plain)
    plain.eval(), model.eval()
    (dx, found), (exact_dx, exact) = grads(model, x, dy), grads(plain, x, dy)
    torch.testing.assert_close(dx, exact_dx)
    for name in exact:
        torch.testing.assert_close(found[name], exact[name])
    assert not random_state_moves(lambda: grads(model, x, dy))
    assert memsave.saved_bytes(lambda: model(x)) <= memsave.saved_bytes(lambda: plain(x))
    with torch.no_grad():
        assert memsave.saved_bytes(lambda: model(x)) == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_without_gradients_nothing_is_kept_and_the_random_stream_moves_as_with_them(layer: str) -> None:
    """Reentrant checkpointing runs forward without and then with gradients from one random state."""
    plain, (x, _) = LAYERS[layer](), step_data()
    model = convert(plain)
    states = []
    for enabled in (True, False):
        torch.manual_seed(0)
        with torch.set_grad_enabled(enabled):
            assert_equal(model(x), plain(x))
        states.append(torch.get_rng_state())
    assert_equal(*states)
    with torch.no_grad():
        assert memsave.saved_bytes(lambda: model(x)) == 0


@pytest.mark.parametrize("layer", LAYERS)
def test_a_frozen_weight_is_exact_and_free(layer: str) -> None:
    plain, (x, dy) = LAYERS[layer](), step_data()
    plain[-1].weight.requires_grad_(False)
    model = convert(plain)
    (dx, found), (exact_dx, exact) = grads(model, x, dy), grads(plain, x, dy)
    torch.testing.assert_close(dx, exact_dx)
    assert found.keys() == exact.keys()
    assert not random_state_moves(lambda: grads(model, x, dy))
    if layer != "noted":
        inputs = x.requires_grad_()
        assert memsave.saved_bytes(lambda: model(inputs)) == 0


@pytest.mark.parametrize("bad", [torch.zeros(N, D, dtype=torch.long), torch.zeros(N, D, dtype=torch.complex64)])
@pytest.mark.parametrize("layer", LAYERS)
def test_integer_and_complex_inputs_get_torchs_own_error(layer: str, bad: Tensor) -> None:
    plain = LAYERS[layer]()
    model = convert(plain)
    messages = []
    for module in (plain[-1], model[-1]):
        with pytest.raises(RuntimeError) as error:
            module(bad)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_wrong_width_gets_torchs_own_error() -> None:
    plain = LAYERS["Linear"]()
    messages = []
    for module in (plain, convert(plain)):
        with pytest.raises(RuntimeError) as error:
            module(torch.zeros(N, D + 1))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_the_draw_is_made_by_torchs_default_generator() -> None:
    model, (x, dy) = convert(LAYERS["Linear"]()), step_data()
    torch.manual_seed(11)
    found = last_weight_grad(model, x, dy)
    torch.manual_seed(11)
    rows, scale = KeepRows(0.3, 1, "pps").draw(x, ops.new_seed(x))
    assert_equal(found, ops.sampled_matmul(dy, ops.gather_rows(x, rows), rows, scale))
