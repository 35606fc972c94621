"""Lazy logits: which calls need no values, and that every other call gets what the plain head gives, bit for bit.

hidden is (B, T, D); logits (B, T, V).
"""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memsave
from memsave import LinearCrossEntropyConfig
from memsave.nn.lazy_logits import LazyLogits

from .helpers import assert_same

BATCH, TOKENS, WIDTH, CLASSES = 3, 5, 4, 40
EVERY = LinearCrossEntropyConfig(target_modules=["0"], min_logits_bytes=0)


def head(dtype: torch.dtype = torch.float32, *, bias: bool = True, lazy: bool = True) -> Any:
    """A container with the head of a language model, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, CLASSES, bias=bias)).to(dtype)
    if lazy:
        memsave.convert_model(model, EVERY)
    return model


def hidden(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def labels(count: int = BATCH * TOKENS) -> Tensor:
    target = torch.randint(0, CLASSES, (count,), generator=torch.Generator().manual_seed(2))
    target[::4] = -100
    return target


def is_lazy(logits: Tensor) -> bool:
    """Without values, that is: nobody needed them."""
    return type(logits) is LazyLogits and logits._lazy.whole.tensor is None


def results(model: Any, loss: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The loss and the gradients of hidden, weight and bias."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    value = loss(model(x))
    value.backward()
    return [value.detach(), *(p.grad for p in [x, *model.parameters()] if p.grad is not None)]


def flat(logits: Tensor) -> Tensor:
    return logits.view(-1, CLASSES)


STAYS_LAZY: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda z: F.cross_entropy(flat(z), labels()),
    "module": lambda z: nn.CrossEntropyLoss()(flat(z), labels()),
    "sum": lambda z: F.cross_entropy(flat(z.float()), labels(), reduction="sum") / 7,
    "none": lambda z: F.cross_entropy(flat(z), labels(), reduction="none").square().mean(),
    "smoothing": lambda z: F.cross_entropy(flat(z), labels(), label_smoothing=0.1),
    "reshape": lambda z: F.cross_entropy(z.reshape(BATCH * TOKENS, -1), labels()),
    "flatten": lambda z: F.cross_entropy(torch.flatten(z, 0, 1), labels()),
    "shifted": lambda z: F.cross_entropy(flat(z[..., :-1, :].contiguous()), labels(BATCH * (TOKENS - 1))),
    "sliced": lambda z: F.cross_entropy(z[:, 1:].reshape(-1, CLASSES), labels(BATCH * (TOKENS - 1))),
    "one sequence": lambda z: F.cross_entropy(z[1], labels(TOKENS)),
    "last dimension": lambda z: F.cross_entropy(z[1, :3, :], labels(3)),
    "cast": lambda z: F.cross_entropy(flat(z.to(torch.float32)), labels()),
    "multiplied": lambda z: F.cross_entropy(flat(z * 0.25), labels()),
    "divided": lambda z: F.cross_entropy(flat(z / 3), labels()),
    "softcap": lambda z: F.cross_entropy(flat(torch.tanh(z / 0.5) * 0.5), labels()),
    "uneven softcap": lambda z: F.cross_entropy(flat((z * 2).tanh() * 3), labels()),
    "one is ignored": lambda z: F.cross_entropy(flat(z), torch.full((BATCH * TOKENS,), -100), reduction="sum"),
}


@pytest.mark.parametrize("name", STAYS_LAZY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_its_gradients_without_logits(name: str, dtype: torch.dtype) -> None:
    seen: list[Tensor] = []

    def loss(logits: Tensor) -> Tensor:
        seen.append(logits)
        return STAYS_LAZY[name](logits)

    ours, plain = results(head(dtype), loss, hidden(dtype)), results(head(dtype, lazy=False), loss, hidden(dtype))
    assert is_lazy(seen[0]) and not is_lazy(seen[1])
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)


MAKES_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "class weights": lambda z: F.cross_entropy(flat(z), labels(), weight=torch.linspace(0, 1, CLASSES)),
    "probabilities": lambda z: F.cross_entropy(flat(z), torch.ones(BATCH * TOKENS, CLASSES) / CLASSES),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), labels().view(BATCH, TOKENS)),
    "one token": lambda z: F.cross_entropy(z[0, 1], torch.tensor(3)),
    "log_softmax": lambda z: F.nll_loss(z.log_softmax(-1).view(-1, CLASSES), labels()),
    "some classes": lambda z: F.cross_entropy(flat(z)[:, :7], labels() % 7),
    "some classes after an ellipsis": lambda z: F.cross_entropy(z[1, ..., :7], labels(TOKENS) % 7),
    "mask": lambda z: F.cross_entropy(flat(z)[labels() >= 0], labels()[labels() >= 0]),
    "other shape": lambda z: F.cross_entropy(z.view(-1, CLASSES // 2), labels(2 * BATCH * TOKENS) % 20),
    "tensor factor": lambda z: F.cross_entropy(flat(z * torch.tensor(0.3)), labels()),
    "negative softcap": lambda z: F.cross_entropy(flat((z / 3).tanh() * -2), labels()),
    "tanh twice": lambda z: F.cross_entropy(flat(z.tanh().tanh()), labels()),
    "float64": lambda z: F.cross_entropy(flat(z.double()), labels()),
    "two losses": lambda z: F.cross_entropy(flat(z), labels()) + z.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("name", MAKES_VALUES)
def test_whatever_else_is_computed_from_the_values(name: str) -> None:
    ours, plain = (results(head(lazy=lazy), MAKES_VALUES[name], hidden()) for lazy in (True, False))
    assert_same(ours, plain)


@pytest.mark.parametrize("name", ["view", "smoothing", "none", "softcap", "divided", "shifted"])
def test_half_precision_is_at_most_twice_as_far_from_float64(name: str) -> None:
    """With the dtype of the plain loss, which is that of the logits."""
    exact = results(head(torch.bfloat16, lazy=False).double(), STAYS_LAZY[name], hidden(torch.bfloat16).double())
    ours, plain = (
        results(head(torch.bfloat16, lazy=lazy), STAYS_LAZY[name], hidden(torch.bfloat16)) for lazy in (1, 0)
    )
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        allowed = 2 * (theirs.double() - right).norm() + torch.finfo(torch.bfloat16).eps * right.norm()
        assert (mine.double() - right).norm() <= allowed


@pytest.mark.parametrize("cast", [False, True])
def test_autocast(cast: bool) -> None:
    def loss(z: Tensor) -> Tensor:
        assert z.dtype == torch.bfloat16
        return F.cross_entropy(flat(z.float() if cast else z), labels())

    def run(lazy: bool, inside: bool) -> list[Tensor]:
        model, x = head(lazy=lazy), hidden()
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x.bfloat16())
            value = loss(z) if inside else None
        value = loss(z) if value is None else value
        value.backward()
        return [value.detach(), *(p.grad for p in (x, *model.parameters()))]  # type: ignore[misc]

    for inside in (True, False):
        for ours, plain in zip(run(True, inside), run(False, inside), strict=True):
            assert ours.dtype == plain.dtype
            assert (ours - plain).norm() <= 2 * torch.finfo(torch.bfloat16).eps * plain.norm()


def test_metadata_needs_no_values() -> None:
    z, plain = head()(hidden())[:, 1:], head(lazy=False)(hidden())[:, 1:]
    for ask in (
        *(lambda t: t.shape, lambda t: t.dtype, lambda t: t.device, lambda t: t.requires_grad, lambda t: t.is_leaf),
        *(lambda t: t.stride(), lambda t: t.numel(), lambda t: t.dim(), lambda t: t.size(-1), len, lambda t: t.nbytes),
        *(
            lambda t: t.is_contiguous(),
            lambda t: t.is_floating_point(),
            lambda t: t.element_size(),
            lambda t: t.is_cuda,
        ),
    ):
        assert ask(z) == ask(plain)
    assert isinstance(z, Tensor) and is_lazy(z) and hash(z) == id(z)


def test_a_handle_becomes_an_ordinary_tensor_in_place() -> None:
    z, plain = head()(hidden()), head(lazy=False)(hidden())
    z.note = "kept"
    assert torch.equal(z.argmax(-1), plain.argmax(-1))
    assert type(z) is Tensor and z.note == "kept" and torch.equal(z, plain) and z.grad_fn is not None


def test_writes_reach_views_taken_before_and_not_copies() -> None:
    ours, plain = head(torch.bfloat16)(hidden(torch.bfloat16)), head(torch.bfloat16, lazy=False)(hidden(torch.bfloat16))
    for z in (ours, plain):
        view, part, copied = flat(z), z[1:], z.float()
        before = copied.detach().clone() if z is plain else None
        z[..., :3] = -1e4
        assert (view[:, :3] == -1e4).all() and (part[..., :3] == -1e4).all() and (copied > -1e3).all()
        part.mul_(2)
        assert (z[1:, :, :3] == -2e4).all() and (z[:1, :, :3] == -1e4).all()
        if before is None:
            expected = copied
        else:
            assert torch.equal(before, expected)
        F.cross_entropy(view.float(), labels() % 30 + 5).backward()


def test_masked_logits_train_as_in_the_plain_model() -> None:
    def loss(z: Tensor) -> Tensor:
        z[..., :5] = -1e9
        return F.cross_entropy(flat(z), labels().clamp(min=7))

    assert_same(results(head(), loss, hidden()), results(head(lazy=False), loss, hidden()))


class Fused(torch.autograd.Function):
    """A loss as libraries write them; torch does not ask `__torch_function__` before it is applied."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits, target)
        return F.cross_entropy(logits.detach(), target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        logits, target = ctx.saved_tensors
        with torch.enable_grad():
            z = torch.zeros_like(logits).copy_(logits).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(z, target), z)
        return gradient * upstream, None


@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_custom_function_gets_values_and_its_gradient_reaches_the_head(
    softcap: bool, used_before: bool, frozen: bool
) -> None:
    def loss(z: Tensor) -> Tensor:
        z = flat((z / 2).tanh() * 2 if softcap else z)
        if used_before:
            z.argmax(-1)
        return Fused.apply(z, labels())

    models = head(), head(lazy=False)
    for model in models:
        model[0].weight.requires_grad_(not frozen)
    assert_same(*(results(model, loss, hidden()) for model in models))


def test_where_the_swap_is_refused_the_values_stand_for_the_handle() -> None:
    z, plain = head()(hidden()), head(lazy=False)(hidden())
    reference = weakref.ref(z)
    assert torch.equal(z.exp(), plain.exp()) and type(z) is LazyLogits and reference() is z
    z[0] = 0
    plain[0] = 0
    assert torch.equal(z + 0, plain) and torch.equal(flat(z), flat(plain))
    F.cross_entropy(flat(z), labels()).backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_head(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reentrant checkpoint gives the handle another history: its gradient must go through that."""
    monkeypatch.setattr("memsave.nn.lazy_logits.CHUNK_BYTES", 0)  # lazy also in its forward without gradients

    def run(lazy: bool) -> list[Tensor]:
        model, x = head(lazy=lazy), hidden()
        z = checkpoint(lambda h: model(h * 1), x, use_reentrant=use_reentrant)
        F.cross_entropy(flat(z), labels()).backward()
        return [p.grad for p in (x, *model.parameters())]  # type: ignore[misc]

    assert_same(run(True), run(False))


def test_gradients_of_the_logits_themselves() -> None:
    def run(lazy: bool) -> list[Tensor]:
        z = head(lazy=lazy)(hidden())
        seen: list[Tensor] = []
        z.register_hook(seen.append)
        z.retain_grad()
        F.cross_entropy(flat(z), labels()).backward()
        assert z.grad is not None
        return [z.grad, *seen]

    assert_same(run(True), run(False))


@pytest.mark.parametrize("ask", [lambda z, loss: z.retain_grad(), lambda z, loss: torch.autograd.grad(loss, z)])
def test_a_gradient_that_is_never_made_is_an_error(ask: Callable[[Tensor, Tensor], object]) -> None:
    z = head()(hidden())
    loss = F.cross_entropy(flat(z), labels())
    with pytest.raises(RuntimeError, match="gradient of these logits is never made"):
        ask(z, loss)
    loss.backward()


def test_a_full_backward_hook_on_the_head() -> None:
    def run(lazy: bool) -> list[Tensor]:
        model, seen = head(lazy=lazy), []
        model[0].register_full_backward_hook(lambda module, dx, dy: seen.extend([*dx, *dy]))
        return [*results(model, STAYS_LAZY["view"], hidden()), *seen]

    assert_same(run(True), run(False))


def test_weights_that_changed_since_raise() -> None:
    model = head()
    z = model(hidden())
    with torch.no_grad():
        model[0].weight.mul_(2)
    for read in (lambda: z.argmax(), lambda: F.cross_entropy(flat(z), labels())):
        with pytest.raises(RuntimeError, match=r"head's weight or input was changed .* Read them before"):
            read()


@pytest.mark.parametrize("target", [CLASSES, -1])
def test_a_target_out_of_range_raises_as_in_torch(target: int) -> None:
    for lazy in (True, False):
        with pytest.raises(IndexError, match="out of bounds"):
            F.cross_entropy(flat(head(lazy=lazy)(hidden())), labels().fill_(target))


def test_shapes_that_do_not_fit_raise_torchs_own_errors() -> None:
    for read in (lambda z: z.view(-1, 7), lambda z: z[BATCH], lambda z: F.cross_entropy(flat(z), labels(4))):
        messages = []
        for lazy in (True, False):
            with pytest.raises((RuntimeError, IndexError, ValueError)) as error:
                read(head(lazy=lazy)(hidden()))
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_all_ignored_is_nan_and_nan_stays_nan() -> None:
    ignored = torch.full((BATCH * TOKENS,), -100)
    loss, *gradients = results(head(), lambda z: F.cross_entropy(flat(z), ignored), hidden())
    assert loss.isnan() and all((g == 0).all() for g in gradients)
    x = hidden().detach()
    x[0, 0, 0] = torch.nan
    assert results(head(), lambda z: F.cross_entropy(flat(z), labels().clamp(min=0)), x)[0].isnan()


def test_copies_pickles_and_prints_have_the_values() -> None:
    plain = head(lazy=False)(hidden()).detach()
    assert torch.equal(pickle.loads(pickle.dumps(head()(hidden()).detach())), plain)
    buffer = io.BytesIO()
    torch.save(head()(hidden()), buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue())), plain)
    assert torch.equal(copy.deepcopy({"logits": head()(hidden()).detach()})["logits"], plain)
    assert repr(head()(hidden())).splitlines()[0] == repr(head(lazy=False)(hidden())).splitlines()[0]
    assert (head()(hidden()).detach().numpy() == plain.numpy()).all() and head()(hidden()).tolist() == plain.tolist()
    with pytest.raises(RuntimeError, match="deepcopy"):  # as for any tensor with a history
        copy.deepcopy(head()(hidden()))


def test_when_logits_are_lazy() -> None:
    """Not without a gain: few tokens for the features, small logits, nothing to train."""
    assert is_lazy(head()(hidden()))
    assert not is_lazy(head()(hidden()[:1, :2]))  # the gradient of the weight would be larger than the logits
    wide = nn.Sequential(nn.Linear(64, 8))
    memsave.convert_model(wide, EVERY)
    assert not is_lazy(wide(torch.randn(1000, 64, requires_grad=True)))
    by_default = nn.Sequential(nn.Linear(WIDTH, CLASSES))
    memsave.convert_model(by_default, LinearCrossEntropyConfig(target_modules=["0"]))
    assert not is_lazy(by_default(hidden()))
    with torch.no_grad():
        assert not is_lazy(head()(hidden()))
        many = nn.Sequential(nn.Linear(WIDTH, 2**12))
        memsave.convert_model(many, LinearCrossEntropyConfig(target_modules=["0"]))
        large, target = many(torch.randn(2**13, WIDTH)), torch.zeros(2**13, dtype=torch.int64)
        assert is_lazy(large) and not large.requires_grad
        assert memsave.measure(lambda: F.cross_entropy(large, target)).peak_bytes < 0.8 * large.nbytes
        assert is_lazy(large)
    with torch.inference_mode():
        assert not is_lazy(head()(hidden()))


def test_steps_under_another_grad_mode_are_those_of_the_plain_model() -> None:
    z = head(torch.bfloat16)(hidden(torch.bfloat16))
    with torch.no_grad():
        cast = z.float()
    assert not cast.requires_grad and not (cast + 0).requires_grad and z.requires_grad
    z = head()(hidden())
    with torch.no_grad():
        assert not F.cross_entropy(flat(z), labels()).requires_grad


def test_second_derivatives_raise() -> None:
    x = hidden()
    (gradient,) = torch.autograd.grad(F.cross_entropy(flat(head()(x)), labels()), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_bytes_kept_are_the_gradients_and_the_peak_has_no_logits() -> None:
    """Kept are hidden, as long as the handle lives, its gradient, the weight's and the bias's."""
    model = nn.Sequential(nn.Linear(WIDTH, 2**12))
    memsave.convert_model(model, EVERY)
    x, target = torch.randn(2**13, WIDTH, requires_grad=True), torch.zeros(2**13, dtype=torch.int64)
    kept = memsave.saved_bytes(lambda: F.cross_entropy(model(x), target))
    assert kept == 2 * x.nbytes + sum(p.nbytes for p in model.parameters())
    measured = memsave.measure(lambda: F.cross_entropy(model(x), target).backward())
    assert measured.peak_bytes - measured.baseline_bytes < 0.6 * 2**13 * 2**12 * 4


def test_compiled_heads_give_plain_logits() -> None:
    torch._dynamo.reset()
    model = head()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert type(compiled(hidden())) is Tensor


def test_a_compiled_loss_takes_lazy_logits() -> None:
    torch._dynamo.reset()
    loss = torch.compile(lambda z: F.cross_entropy(flat(z.float()), labels()), backend="aot_eager")
    assert_same(results(head(), loss, hidden()), results(head(lazy=False), loss, hidden()))
