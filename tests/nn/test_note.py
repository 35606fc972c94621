"""Notes: linears keep nothing of a norm's output, and never use a note that does not hold."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import memsave
from memsave.nn import note, rows

from .helpers import Block, HFStyleRMSNorm, assert_same, converted, gradients

WIDTH = 8
NORMS = [nn.LayerNorm, nn.RMSNorm, HFStyleRMSNorm]


def blocks(norm: type[nn.Module]) -> tuple[Block, nn.Module]:
    torch.manual_seed(0)
    plain = Block(norm(WIDTH))
    return plain, converted(plain)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))


def recomputations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often a note recomputes a whole output."""
    count: list[int] = []
    original = note.Recipe.output

    def output(self: note.Recipe, tensors: list[Tensor]) -> Tensor:
        if self._output is None:
            count.append(1)
        return original(self, tensors)

    monkeypatch.setattr(note.Recipe, "output", output)
    return count


@pytest.mark.parametrize("norm", NORMS)
def test_linears_keep_nothing_of_a_norms_output(norm: type[nn.Module], x: Tensor) -> None:
    plain, ours = blocks(norm)
    after_norm = 3 * 10 * 6 * 4  # q.tanh(), k.tanh(): two kept once each, shared with the product; and v keeps nothing
    small = {nn.LayerNorm: 2, nn.RMSNorm: 1, HFStyleRMSNorm: 1}[norm]
    statistics = {nn.LayerNorm: 2, nn.RMSNorm: 1, HFStyleRMSNorm: 1}[norm]
    expected = 4 * (10 * WIDTH + 10 * statistics + small * WIDTH) + after_norm - 10 * 6 * 4
    x.requires_grad_(True)
    assert memsave.saved_bytes(lambda: ours(x)) == expected
    assert memsave.saved_bytes(lambda: plain(x)) >= expected + 4 * 10 * WIDTH - 4 * small * WIDTH


def identity_checkpoint(block: nn.Module, x: Tensor, **options: object) -> Tensor:
    return checkpoint(block, x, **options)


def norm_outside(block: Block, x: Tensor, *, nested: bool, use_reentrant: bool) -> Tensor:
    """The norm runs outside the checkpoint in which the linears run, itself inside another one if `nested`."""

    def linears(y: Tensor) -> Tensor:
        return block.q(y).tanh() * block.k(y).tanh() + block.v(y)

    def whole(x: Tensor) -> Tensor:
        return checkpoint(linears, block.norm(x), use_reentrant=use_reentrant)

    return checkpoint(whole, x, use_reentrant=use_reentrant) if nested else whole(x)


def linears_saved_on_cpu(block: Block, x: Tensor) -> Tensor:
    y = block.norm(x)
    with save_on_cpu():
        return block.q(y).tanh() * block.k(y).tanh() + block.v(y)


def all_saved_on_cpu(block: Block, x: Tensor) -> Tensor:
    with save_on_cpu():
        return block(x)


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "checkpoint": partial(identity_checkpoint, use_reentrant=False),
    "reentrant checkpoint": partial(identity_checkpoint, use_reentrant=True),
    "norm outside checkpoint": partial(norm_outside, nested=False, use_reentrant=False),
    "norm outside reentrant checkpoint": partial(norm_outside, nested=False, use_reentrant=True),
    "norm outside nested checkpoint": partial(norm_outside, nested=True, use_reentrant=False),
    "norm outside nested reentrant checkpoint": partial(norm_outside, nested=True, use_reentrant=True),
    "linears under save_on_cpu": linears_saved_on_cpu,
    "all under save_on_cpu": all_saved_on_cpu,
    "view of the output": lambda block, x: _on_views(block, x),
    "cast of the output": lambda block, x: block.v(block.norm(x).double().float()),
}


def _on_views(block: Block, x: Tensor) -> Tensor:
    y = block.norm(x)
    return block.q(y[:, 1:]).sum(0) * block.v(y.view(-1, WIDTH))[:4] + block.k(y[:, :])[0, 1:]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_plain_modules(norm: type[nn.Module], run: str, x: Tensor) -> None:
    plain, ours = blocks(norm)
    assert_same(
        gradients(lambda x: RUNS[run](ours, x), ours, x), gradients(lambda x: RUNS[run](plain, x), plain, x), ulps=16
    )


def test_a_note_from_outside_a_hook_is_not_used_inside(x: Tensor) -> None:
    _, ours = blocks(nn.RMSNorm)
    y = ours.norm(x)
    assert note.find(y) is not None
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert note.find(y) is None
        inner = ours.norm(x)
        assert note.find(inner) is not None
    assert note.find(inner) is None


def test_an_output_whose_data_was_swapped_has_no_note(x: Tensor) -> None:
    _, ours = blocks(nn.RMSNorm)
    y = ours.norm(x)
    y.data = torch.zeros_like(y)
    assert note.find(y) is None
    y = ours.norm(x)
    assert note.find(y) is not None and note.find(torch._neg_view(y)) is None


def test_which_tensors_count_as_the_output(x: Tensor) -> None:
    _, ours = blocks(nn.LayerNorm)
    y = ours.norm(x)
    same = [y, y[:, :], y.view(-1, WIDTH), y.view(10, 1, WIDTH).squeeze(1)]
    other = [y[:, 1:], y.transpose(0, 1), y.view(20, 4), y.clone(), y * 1, y.detach().clone(), y.double(), x]
    assert [note.find(t) is not None for t in same] == [True] * 4
    assert [note.find(t) is None for t in other] == [True] * 8


@pytest.mark.parametrize("what", ["output", "input"])
def test_modification_after_the_note_is_detected(what: str, x: Tensor) -> None:
    plain, ours = blocks(HFStyleRMSNorm)

    def run(block: Block, x: Tensor) -> Tensor:
        h = x * 1.5
        y = block.norm(h)
        (y if what == "output" else h.detach()).mul_(2)
        if what == "output":
            return block.q(y) + block.k(y)
        return block.q(y)

    if what == "output":
        assert_same(gradients(lambda x: run(ours, x), ours, x), gradients(lambda x: run(plain, x), plain, x))
    else:  # the norm itself needs the old input, which autograd notices, as in the plain model
        for block in (plain, ours):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradients(lambda x, block=block: run(block, x), block, x)


def test_modification_after_the_linears_ran_is_detected(x: Tensor) -> None:
    _, ours = blocks(nn.RMSNorm)
    h = x.requires_grad_(True) * 1.0
    out = ours.q(ours.norm(h)).sum()
    h.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_siblings_share_one_recomputation(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = blocks(nn.RMSNorm)
    count = recomputations(monkeypatch)
    gradients(ours, ours, x)
    assert len(count) == 1


def test_the_recomputed_output_is_freed(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last sibling's backward, and at the end of the pass where a sibling took no part."""
    _, ours = blocks(nn.RMSNorm)
    alive: list[weakref.ref[Tensor]] = []
    original = note.Recipe.output

    def output(self: note.Recipe, tensors: list[Tensor]) -> Tensor:
        result = original(self, tensors)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(note.Recipe, "output", output)
    y = ours.norm(x)
    q, v = ours.q(y).sum(), ours.v(y).sum()
    del y
    q.backward(retain_graph=True)
    gc.collect()
    assert len(alive) == 1 and alive[0]() is None
    v.backward()
    gc.collect()
    assert len(alive) == 2 and alive[1]() is None
    assert ours.q.weight.grad is not None and ours.v.weight.grad is not None


@pytest.mark.parametrize("norm", NORMS)
def test_retain_graph_and_partial_backward(norm: type[nn.Module], x: Tensor) -> None:
    plain, ours = blocks(norm)
    results = []
    for block in (plain, ours):
        y = block.norm(x)
        q, k, v = block.q(y).tanh(), block.k(y).tanh(), block.v(y)
        out = (q * k + v).square().sum()
        grads = [torch.autograd.grad(out, [block.k.weight], retain_graph=True)[0]]
        grads += torch.autograd.grad(out, [block.q.weight, block.v.bias], retain_graph=True)
        out.backward(retain_graph=True)
        out.backward()
        results.append([*grads, *(p.grad for p in block.parameters())])
    assert_same(results[1], results[0])


def test_under_a_checkpoint_nothing_is_held_between_forward_and_backward(x: Tensor) -> None:
    """Contexts of autograd hold no tensor of a note, or checkpointing would free nothing."""
    _, ours = blocks(HFStyleRMSNorm)
    made: list[weakref.ref[Tensor]] = []
    handle = ours.norm.register_forward_hook(lambda _m, _i, out: made.append(weakref.ref(out)))
    recipe_inputs: list[weakref.ref[Tensor]] = []

    def run(h: Tensor) -> Tensor:
        h = h * 2.0
        recipe_inputs.append(weakref.ref(h))
        return ours(h)

    out = checkpoint(run, x.requires_grad_(True), use_reentrant=False)
    gc.collect()
    assert [ref() for ref in made] == [None] and [ref() for ref in recipe_inputs] == [None]
    assert len(note._notes) == 0
    out.sum().backward()
    handle.remove()


@pytest.mark.parametrize("norm", NORMS)
def test_an_output_that_is_held_after_backward_does_not_hold_its_note(norm: type[nn.Module], x: Tensor) -> None:
    _, ours = blocks(norm)
    h = x.requires_grad_(True) * 1.0
    storage = weakref.ref(h.untyped_storage())
    y = ours.norm(h)
    out = ours.q(y).sum()
    del h
    gc.collect()
    assert storage() is not None
    out.backward()
    gc.collect()
    assert storage() is None and note.find(y) is None


def test_notes_cost_nothing_without_gradients(x: Tensor) -> None:
    _, ours = blocks(nn.LayerNorm)
    with torch.no_grad():
        assert note.find(ours.norm(x)) is None
    ours.requires_grad_(False)
    assert note.find(ours.norm(x)) is None  # nothing will be kept for its sake
    with torch.inference_mode():
        ours(x)


def test_a_note_does_not_travel_with_a_saved_tensor(x: Tensor) -> None:
    _, ours = blocks(nn.RMSNorm)
    y = ours.norm(x.requires_grad_(True))
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True), y)


def test_frozen_linears_keep_nothing_and_trainable_ones_beside_them_work(x: Tensor) -> None:
    plain, ours = blocks(nn.RMSNorm)
    for block in (plain, ours):
        block.q.requires_grad_(False)
        block.norm.requires_grad_(False)
    assert_same(gradients(ours, ours, x), gradients(plain, plain, x))


def test_optimizer_step_between_forward_and_backward_does_not_change_a_note(x: Tensor) -> None:
    """A note copies the norm's weight; the plain modules keep the output, which no later step changes either."""
    plain, ours = blocks(HFStyleRMSNorm)
    results = []
    for block in (plain, ours):
        block.norm.requires_grad_(False)
        out = block.q(block.norm(x)).sum()
        with torch.no_grad():
            block.norm.weight.add_(1.0)
        out.backward()
        results.append([block.q.weight.grad])
    assert_same(results[1], results[0])


@pytest.mark.parametrize("norm", NORMS)
def test_compile_runs_the_plain_modules_without_a_graph_break(norm: type[nn.Module], x: Tensor) -> None:
    plain, ours = blocks(norm)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled, ours, x), gradients(plain, plain, x))
    assert len(note._notes) == 0


def test_functorch_export_and_forward_mode_run_the_plain_modules(x: Tensor) -> None:
    plain, ours = blocks(nn.LayerNorm)
    functional = torch.func.grad(lambda x: ours(x).sum())(x)
    assert_same([functional], [torch.func.grad(lambda x: plain(x).sum())(x)])
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    _, tangent = torch.func.jvp(ours, (x,), (direction,))
    assert_same([tangent], [torch.func.jvp(plain, (x,), (direction,))[1]])
    with torch.no_grad():
        assert_same([torch.export.export(ours, (x,)).module()(x)], [plain(x)])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", [lambda y: y.square().sum(), lambda y: y.sum()], ids=["square", "linear"])
def test_second_derivatives_raise_instead_of_being_wrong(
    norm: type[nn.Module], loss: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Also where the upstream gradient is a constant, as that of a sum is."""
    _, ours = blocks(norm)
    x.requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(ours.v(ours.norm(x))), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_modules_are_called_by_keyword_and_with_computed_weights_as_before(norm: type[nn.Module], x: Tensor) -> None:
    plain, ours = blocks(norm)
    keyword = "hidden_states" if norm is HFStyleRMSNorm else "input" if norm is nn.LayerNorm else "x"
    assert torch.equal(ours.norm(**{keyword: x}), plain.norm(**{keyword: x}))
    assert torch.equal(ours.q(input=x), plain.q(input=x))
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight * 2

    for module in (ours.norm, ours.q):
        parametrize.register_parametrization(module, "weight", Counted())
        calls.clear()
        module(x)
        assert len(calls) == 1
    replicas = [model.norm._replicate_for_data_parallel() for model in blocks(norm)]
    for replica in replicas:
        for name, value in plain.norm.named_parameters():
            setattr(replica, name, value * 3)
    assert torch.equal(replicas[1](x), replicas[0](x))


def test_a_norm_uses_the_weight_that_the_module_shows(x: Tensor) -> None:
    """Pruning and DataParallel replicas hold it as a plain attribute."""
    plain, ours = blocks(nn.RMSNorm)
    for norm in (plain.norm, ours.norm):
        prune.l1_unstructured(norm, "weight", 0.5)
        nn.init.constant_(norm.weight_orig, 3.0)
    assert torch.equal(ours.norm(x), plain.norm(x))


def test_under_checkpoints_notes_do_not_keep_the_norms_inputs(x: Tensor) -> None:
    """The output of a checkpointed block that ends with a norm lives on as the input of the next one."""
    blocks_ = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(5)]
    model = converted(nn.Sequential(*blocks_))
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    for block in model:
        block[1].register_forward_pre_hook(lambda _m, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    h = x.requires_grad_(True)
    for block in model:
        h = checkpoint(block, h, use_reentrant=False)
    gc.collect()
    assert [ref() is not None for ref in inputs] == [False, False, False, True, True]
    h.sum().backward()


def test_checkpoint_hooks_are_not_held_by_notes_and_samples(x: Tensor) -> None:
    """A checkpoint's hooks lead to the tensors that notes are looked up by: holding them would leak both."""
    _, ours = blocks(nn.RMSNorm)
    memsave.convert_model(ours, memsave.WTACRSConfig(min_rows=1, target_modules=r".*"))
    alive = []
    for _ in range(2):
        h = x.clone().requires_grad_(True) * 1.0
        out = checkpoint(lambda h: ours.q(h) + ours.v(ours.norm(h)), h, use_reentrant=False)
        alive.append(weakref.ref(h))
        del h, out
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    assert len(note._notes) == 0 and len(rows._samples) == 0


def test_a_linear_that_is_only_named_like_conv1d_is_a_linear(x: Tensor) -> None:
    class Conv1D(nn.Linear):
        """A pointwise convolution."""

    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(WIDTH), Conv1D(WIDTH, WIDTH))
    ours = converted(plain)
    assert_same(gradients(ours, ours, x), gradients(plain, plain, x))
