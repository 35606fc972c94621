"""Dropout: torch's own mask and random stream, one bit kept per element, and notes handed on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import memsave
from memsave import RecomputeDropoutConfig
from memsave.nn import note

from .helpers import Block, assert_same, converted, gradients

WIDTH = 8
FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def dropout(p: float = 0.5, **settings: bool) -> nn.Module:
    """A converted dropout, in a container as conversion needs one."""
    return converted(nn.Sequential(nn.Dropout(p, **settings), nn.Linear(WIDTH, WIDTH)), RecomputeDropoutConfig())[0]


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, input gradient, and torch's random state afterwards."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(True)
    torch.manual_seed(3)
    y = call(x)
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad, torch.get_rng_state()


SHAPES = [(), (1,), (7,), (5, 3), (4, 16), (2, 3, 19), (3, 0, 8), (2, 2, 2, 24), (40, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_output_gradient_and_random_stream_are_torchs_bit_for_bit(
    p: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = tensor(*shape, dtype=dtype)
    for ours, plain in zip(run(dropout(p), x), run(nn.Dropout(p), x), strict=True):
        assert ours.dtype == plain.dtype and torch.equal(ours, plain)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[:, 3:40],
        lambda x: x.view(6, 4, 41).permute(2, 0, 1),
        lambda x: x[:, :1].expand(24, 5),
        lambda x: x.view(2, 3, 4, 41).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "slice", "permuted", "expanded", "channels_last"],
)
def test_the_mask_is_torchs_for_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    x, module = tensor(24, 41), dropout(0.3)
    for ours, plain in zip(run(lambda x: module(view(x)), x), run(lambda x: F.dropout(view(x), 0.3), x), strict=True):
        assert torch.equal(ours, plain)


def test_not_finite_values_and_zeros_go_through_as_in_torch() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, -1.0]).repeat(20)
    ours, plain = run(dropout(0.5), x)[0], run(nn.Dropout(0.5), x)[0]
    assert torch.equal(ours.isnan(), plain.isnan()) and ours.isnan().any()
    assert torch.equal(ours.nan_to_num(), plain.nan_to_num()) and torch.equal(ours.signbit(), plain.signbit())


@pytest.mark.parametrize("threads", [1, 3])
def test_many_elements_and_threads(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for ours, plain in zip(
            run(dropout(0.2), tensor(300, 1001)), run(nn.Dropout(0.2), tensor(300, 1001)), strict=True
        ):
            assert torch.equal(ours, plain)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_bit_is_kept_for_each_element(dtype: torch.dtype) -> None:
    x = tensor(10, 3, 40, dtype=dtype).requires_grad_(True)
    assert memsave.saved_bytes(lambda: dropout()(x)) == 10 * 3 * 5
    assert memsave.saved_bytes(lambda: nn.Dropout()(x)) >= 10 * 3 * 40 * dtype.itemsize
    assert memsave.saved_bytes(lambda: dropout(1.0)(x)) == dtype.itemsize == dropout(1.0).kept_bytes(x.shape, dtype)
    assert memsave.saved_bytes(lambda: dropout()(x.detach())) == 0
    assert memsave.saved_bytes(lambda: dropout().eval()(x)) == 0 == dropout().eval().kept_bytes(x.shape, dtype)


def test_the_output_may_be_modified_in_place() -> None:
    def residual(module: nn.Module, x: Tensor) -> Tensor:
        y = module(x)
        y += 1
        return y.mul_(2)

    for ours, plain in zip(
        run(partial(residual, dropout()), tensor(4, 9)), run(partial(residual, nn.Dropout()), tensor(4, 9)), strict=True
    ):
        assert torch.equal(ours, plain)


def blocks(p: float = 0.25) -> tuple[Block, Block]:
    """A norm and a dropout whose output three linears read."""
    torch.manual_seed(0)
    plain = Block(nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(p)))
    return plain, converted(plain)  # type: ignore[return-value]


@pytest.fixture
def x() -> Tensor:
    return tensor(2, 5, WIDTH)


def saved_on_cpu(block: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return block(x)


def nested(block: nn.Module, x: Tensor, use_reentrant: bool) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=use_reentrant) * 1.5

    return checkpoint(inner, x, use_reentrant=use_reentrant)


def dropout_outside(block: Block, x: Tensor, use_reentrant: bool) -> Tensor:
    """The linears run in a checkpoint of their own: the note from outside does not hold there."""

    def linears(y: Tensor) -> Tensor:
        return block.q(y).tanh() * block.k(y).tanh() + block.v(y)

    return checkpoint(linears, block.norm(x), use_reentrant=use_reentrant)


def modified(block: Block, x: Tensor) -> Tensor:
    y = block.norm(x)
    y += 1
    return block.q(y) + block.k(y)


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=False),
    "reentrant checkpoint": lambda block, x: checkpoint(block, x, use_reentrant=True),
    "nested checkpoint": partial(nested, use_reentrant=False),
    "nested reentrant checkpoint": partial(nested, use_reentrant=True),
    "dropout outside checkpoint": partial(dropout_outside, use_reentrant=False),
    "dropout outside reentrant checkpoint": partial(dropout_outside, use_reentrant=True),
    "save_on_cpu": saved_on_cpu,
    "modified in place": modified,
    "eval": lambda block, x: block.eval()(x),
}


@pytest.mark.parametrize("run_", RUNS)
def test_gradients_through_notes_are_those_of_the_plain_modules(run_: str, x: Tensor) -> None:
    results = []
    for block in blocks():
        torch.manual_seed(5)
        results.append(gradients(lambda x, block=block: RUNS[run_](block, x), block, x))
    assert_same(results[1], results[0], ulps=16)


def test_linears_that_read_it_keep_nothing_where_its_input_is_noted(x: Tensor) -> None:
    x.requires_grad_(True)
    _, ours = blocks()
    kept = memsave.saved_bytes(lambda: ours(x))
    norm = 10 * WIDTH * 4 + 2 * 10 * 4 + 2 * WIDTH * 4  # the input, two statistics per row, copies of weight and bias
    assert kept == norm + 10 * 1 + 2 * 10 * 6 * 4  # one byte of bits per row; q.tanh() and k.tanh()


def test_a_dropout_of_a_tensor_without_a_note_attaches_none(x: Tensor) -> None:
    assert note.find(dropout()(x.requires_grad_(True) * 1)) is None


@pytest.mark.parametrize("how", ["eval", "p = 0"])
def test_a_note_passes_where_nothing_is_dropped(how: str, x: Tensor) -> None:
    _, ours = blocks(0.25 if how == "eval" else 0.0)
    if how == "eval":
        ours.eval()
    assert note.find(ours.norm(x.requires_grad_(True))) is not None
    _, alone = blocks()
    alone.norm = alone.norm[0]
    assert memsave.saved_bytes(lambda: ours(x)) == memsave.saved_bytes(lambda: alone(x))


def test_rows_of_a_dropped_out_tensor_are_recomputed_alone(x: Tensor) -> None:
    _, ours = blocks()
    y = ours.norm(x.requires_grad_(True))
    found = note.find(y)
    assert found is not None
    rows = torch.tensor([7, 0, 7])
    assert torch.equal(found.recipe.output_rows(found.tensors, rows), y.reshape(-1, WIDTH)[rows])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_random_stream_after_a_checkpoint_is_the_plain_models(use_reentrant: bool, x: Tensor) -> None:
    states = []
    for block in blocks():
        torch.manual_seed(5)
        gradients(lambda x, block=block: checkpoint(block, x, use_reentrant=use_reentrant), block, x)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_second_and_third_derivatives_are_torchs(x: Tensor) -> None:
    def third(module: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_(True)
        torch.manual_seed(3)
        y = module(leaf).pow(4).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, [leaf], create_graph=True)
            y = (grad * torch.linspace(-1, 2, grad.numel()).view(grad.shape)).sum()
        return grad

    assert torch.equal(third(dropout()), third(nn.Dropout()))


def test_a_call_that_drops_nothing_returns_its_input_as_torch_does(x: Tensor) -> None:
    x.requires_grad_(True)
    empty = tensor(3, 0).requires_grad_(True)
    for module in (nn.Dropout(), dropout()):
        assert module(empty) is empty and module.eval()(x) is x
    assert dropout(0.0)(x) is x


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: nn.Dropout(0.1, inplace=True), "overwrites its input"),
        (lambda: Scaled(0.1), "forward of its own"),
        (lambda: nn.Dropout1d(0.1), "not a kind"),
        (lambda: nn.AlphaDropout(0.1), "not a kind"),
    ],
)
def test_other_dropouts_are_left_alone_with_a_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make())
    before = type(model[1])
    report = memsave.convert_model(model, RecomputeDropoutConfig())
    assert type(model[1]) is before
    if reason != "not a kind":  # the report names modules without parameters only where a method might have taken them
        assert reason in str(report)


class Scaled(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def test_a_bare_conversion_converts_dropouts() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1))
    memsave.convert_model(model)
    assert type(model[1]).__name__ == "MemsaveDropout"
