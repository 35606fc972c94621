"""`memsave.linear_cross_entropy` against torch's own operators on all logits: values, gradients, bytes, bad input.

hidden is (N, D), weight (V, D), bias (V,), target (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memsave import linear_cross_entropy
from memsave.nn import linear_cross_entropy as module
from tests.harness import assert_within_budget

FLOAT_BYTES = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few tokens, so that several of them, and a ragged last one, are the rule."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * 11 * FLOAT_BYTES)
    monkeypatch.setattr(module, "MIN_TOKENS_PER_PASS", 3)


def plain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition, written with all logits."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "ignore_index": ignore_index, "reduction": reduction}
    loss = F.cross_entropy(logits, target, **options)
    if not z_loss:
        return loss
    squared = z_loss * logits.logsumexp(-1).square() * (target != ignore_index)
    if reduction == "none":
        return loss + squared
    return loss + (squared.sum() if reduction == "sum" else squared.sum() / (target != ignore_index).sum().clamp(min=1))


def inputs(
    n: int = 10, v: int = 11, d: int = 5, dtype: torch.dtype = torch.float64, ignored: int = 3
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n * 100 + v)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((n, d), (v, d), (v,))]
    target = torch.randint(v, (n,), generator=generator)
    target[torch.randperm(n, generator=generator)[:ignored]] = -100
    hidden, weight, bias = (t.to(dtype).requires_grad_(True) for t in made)
    return {"hidden": hidden, "weight": weight, "target": target, "bias": bias}


def loss_and_gradients(fn: Callable[..., Tensor], tensors: dict[str, Any], **options: Any) -> list[Tensor]:
    """The loss, and the gradients of a weighted sum of it for the inputs that need one."""
    named = {name: t.detach().requires_grad_(t.requires_grad) if t is not None else t for name, t in tensors.items()}
    loss = fn(**named, **options)
    loss.backward(torch.linspace(0.5, -2, loss.numel(), dtype=loss.dtype).view_as(loss))
    return [loss.detach(), *(t.grad for t in named.values() if t is not None and t.requires_grad)]


def assert_equal_to_plain(tensors: dict[str, Any], **options: Any) -> None:
    found, expected = (loss_and_gradients(fn, tensors, **options) for fn in (linear_cross_entropy, plain))
    torch.testing.assert_close(found, expected, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 13), st.integers(1, 6)),
    share_ignored=st.sampled_from([0.0, 0.5, 1.0]),
    ignore_index=st.sampled_from([-100, 0]),
    with_bias=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
            "softcap": st.sampled_from([None, 1.5]),
            "z_loss": st.sampled_from([0.0, 0.2]),
            "reduction": st.sampled_from(["none", "mean", "sum"]),
        }
    ),
)
def test_equals_plain(
    sizes: tuple[int, int, int],
    share_ignored: float,
    ignore_index: int,
    with_bias: bool,
    options: dict[str, Any],
) -> None:
    n, v, d = sizes
    tensors = inputs(n, v, d, ignored=round(share_ignored * n))
    tensors["target"][tensors["target"] == -100] = ignore_index
    if not with_bias:
        tensors["bias"] = None
    assert_equal_to_plain(tensors, ignore_index=ignore_index, **options)


ALL_OPTIONS = {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("needed", ["hidden", "weight", "bias"])
def test_gradcheck(needed: str, reduction: str) -> None:
    tensors = inputs()
    for name in {"hidden", "weight", "bias"} - {needed}:
        tensors[name].requires_grad_(False)

    def run(t: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors | {needed: t}, reduction=reduction, **ALL_OPTIONS)

    torch.autograd.gradcheck(run, (tensors[needed],))


def test_logsumexp_is_returned_and_differentiable() -> None:
    tensors = inputs()
    loss, lse = linear_cross_entropy(**tensors, return_logsumexp=True)
    counts = tensors["target"] != -100
    logits = F.linear(tensors["hidden"], tensors["weight"], tensors["bias"])
    expected = logits.logsumexp(-1) * counts
    torch.testing.assert_close((loss, lse), (plain(**tensors), expected))
    named = [tensors[name] for name in ("hidden", "weight", "bias")]
    found = torch.autograd.grad(loss + lse.square().sum(), named)
    torch.testing.assert_close(found, torch.autograd.grad(plain(**tensors) + expected.square().sum(), named))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_ignored_is_as_in_torch(reduction: str) -> None:
    tensors = inputs(ignored=10)
    assert_equal_to_plain(tensors, reduction=reduction)
    loss, *gradients = loss_and_gradients(linear_cross_entropy, tensors, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else not loss.count_nonzero()
    assert not any(gradient.count_nonzero() for gradient in gradients)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_leading_dimensions(shape: tuple[int, ...], reduction: str) -> None:
    weight, hidden, target = torch.randn(11, 5), torch.randn(*shape, 5), torch.randint(11, shape)
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction)
    expected = plain(hidden.reshape(-1, 5), weight, target.reshape(-1), reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    torch.testing.assert_close(loss.flatten(), expected.flatten(), equal_nan=True)


def test_noncontiguous_inputs() -> None:
    tensors = inputs(n=12)
    hidden, weight, target, bias = tensors.values()
    turned = {
        "hidden": hidden.detach().view(3, 4, 5).transpose(0, 1).requires_grad_(),  # (4, 3, D)
        "weight": weight.detach().t().contiguous().t().requires_grad_(),
        "target": target.view(3, 4).t(),  # (4, 3)
        "bias": bias,
    }
    assert not any(turned[name].is_contiguous() for name in ("hidden", "weight", "target"))
    found, expected = (loss_and_gradients(linear_cross_entropy, t) for t in (turned, tensors))
    torch.testing.assert_close(found[1].transpose(0, 1).reshape(12, 5), expected[1])
    torch.testing.assert_close([found[0], *found[2:]], [expected[0], *expected[2:]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("scale", [1e4, float("nan")])
def test_large_and_undefined_logits(scale: float, reduction: str) -> None:
    tensors = inputs(dtype=torch.float32)
    tensors["hidden"].data[0] *= scale
    tensors["target"][0] = 1
    assert_equal_to_plain(tensors, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_large_logits_keep_what_distinguishes_them(reduction: str) -> None:
    """All near 1e4, where float32 has steps of 1e-3; their differences, and so loss and gradients, are exact."""
    weight = 1 + torch.arange(11.0)[:, None] * 2.0**-13
    tensors = {"hidden": torch.full((4, 1), 1e4), "weight": weight, "target": torch.tensor([0, 3, 9, 10])}
    tensors["weight"].requires_grad_()
    wide = tensors | {"hidden": torch.full((4, 1), 1e4).double(), "weight": weight.detach().double().requires_grad_()}
    found = loss_and_gradients(linear_cross_entropy, tensors, reduction=reduction)
    for ours, exact in zip(found, loss_and_gradients(plain, wide, reduction=reduction), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"reduction": "none"}, {"z_loss": 0.1, "reduction": "sum"}])
def test_error_within_twice_that_of_plain(dtype: torch.dtype, options: dict[str, Any], monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 16 * 96 * 6)
    tensors = inputs(64, 96, 32, dtype)
    wide = {
        name: t.detach().double().requires_grad_(True) if t.is_floating_point() else t for name, t in tensors.items()
    }
    found, rounded, exact = (
        loss_and_gradients(fn, given, **options)
        for fn, given in ((linear_cross_entropy, tensors), (plain, tensors), (plain, wide))
    )
    assert found[0].dtype == torch.float32
    for ours, plains, truth in zip(found, rounded, exact, strict=True):
        assert_within_budget(ours, truth, plains)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_autocast(reduction: str) -> None:
    tensors = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (loss_and_gradients(fn, tensors, reduction=reduction) for fn in (linear_cross_entropy, plain))
    exact = loss_and_gradients(plain, tensors, reduction=reduction)
    assert not torch.equal(found[1], exact[1])
    assert [t.dtype for t in found] == [torch.float32] * 4
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_backward_under_another_autocast(reduction: str) -> None:
    tensors = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(**tensors, reduction=reduction).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(loss, [tensors["hidden"], tensors["weight"]], retain_graph=True)
    expected = torch.autograd.grad(loss, [tensors["hidden"], tensors["weight"]])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, ALL_OPTIONS])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, options: dict[str, Any]) -> None:
    def checkpointed(**tensors: Any) -> Tensor:
        names = list(tensors)
        run = lambda *values: linear_cross_entropy(**dict(zip(names, values, strict=True)), **options)  # noqa: E731
        return checkpoint(run, *tensors.values(), use_reentrant=reentrant)

    tensors = inputs()
    found = loss_and_gradients(checkpointed, tensors)
    torch.testing.assert_close(found, loss_and_gradients(linear_cross_entropy, tensors, **options), rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_backwards_add_up_and_second_derivatives_raise(reduction: str) -> None:
    tensors = inputs()
    loss = linear_cross_entropy(**tensors, reduction=reduction).sum()
    first, second = (torch.autograd.grad(loss, tensors["weight"], retain_graph=True)[0].clone() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(loss, tensors["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, ALL_OPTIONS])
def test_compile(options: dict[str, Any]) -> None:
    compiled = torch.compile(lambda **t: linear_cross_entropy(**t, **options), backend="aot_eager", fullgraph=True)
    tensors = inputs()
    torch.testing.assert_close(loss_and_gradients(compiled, tensors), loss_and_gradients(plain, tensors, **options))


def test_transforms_see_plain_operators() -> None:
    tensors = {name: t.detach() for name, t in inputs().items()}
    found = torch.func.hessian(lambda h: linear_cross_entropy(**tensors | {"hidden": h}))(tensors["hidden"])
    torch.testing.assert_close(found, torch.func.hessian(lambda h: plain(**tensors | {"hidden": h}))(tensors["hidden"]))
