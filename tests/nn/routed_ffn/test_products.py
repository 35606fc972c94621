"""The products of a routed block: against the dense block, a dense masked reference, and finite differences."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import memsave
from memsave import RoutedFFNConfig
from memsave.nn.routed_ffn import grouped
from memsave.nn.routed_ffn.layout import PARTS
from memsave.nn.routed_ffn.products import Work
from memsave.nn.routed_ffn.products import routed as run_products
from memsave.nn.routed_ffn.routing import chosen_blocks, dispatch

from .toys import KINDS, OUT, UNITS, WIDTH, assert_same, dense, gradients, routed, tokens, upstream

# torch does not count the product that is added in place.
COUNTED_TOO = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes[:3])}
kinds = pytest.mark.parametrize("kind", KINDS)
actives = pytest.mark.parametrize("active", [1, 2, 4])
ranks = pytest.mark.parametrize("lora_rank", [0, 3])


@kinds
def test_all_blocks_with_equal_scores_are_the_dense_block(kind: str) -> None:
    plain = dense(kind)
    made = routed(copy.deepcopy(plain), active=4, balance_loss=0.0)
    nn.init.zeros_(made.router.weight)
    nn.init.zeros_(made.router.bias)
    expected, ours = gradients(plain, plain, tokens()), gradients(made, made, tokens())
    named = {"c_fc": "up", "c_proj": "down", "0": "up", "2": "down"}
    renamed = {}
    for name, gradient in expected.items():
        child, _, part = name.rpartition(".")
        role = named.get(child, child.removesuffix("_proj"))
        renamed[f"{role}_{part}" if child else name] = gradient
    # The router's gradients have nothing to be compared with here, and its part of x's is zero with its weight.
    ours = {name: gradient for name, gradient in ours.items() if "router" not in name}
    assert_same(ours, renamed)


@kinds
@actives
@ranks
def test_output_and_gradients_are_those_of_the_masked_dense_block(kind: str, active: int, lora_rank: int) -> None:
    made = routed(dense(kind), active=active, lora_rank=lora_rank)
    ours, expected = gradients(made, made, tokens()), gradients(made.reference, made, tokens())
    trained = {"router.weight", "router.bias"}
    parts = ("lora_a", "lora_b") if lora_rank else ("weight", "bias")
    trained |= {f"{n}_{p}" for n in made.layout.names for p in parts if getattr(made, f"{n}_{p}") is not None}
    assert ours.keys() == {"y", "x", *trained}
    assert_same(ours, expected)
    assert all(gradient.abs().max() > 1e-6 for gradient in ours.values())


@pytest.mark.parametrize("lora_rank", [0, 2])
@pytest.mark.parametrize(("kind", "active"), [("gated", 1), ("fused", 2), ("plain", 2), ("conv1d", 3)])
def test_gradients_by_finite_differences(kind: str, active: int, lora_rank: int) -> None:
    """The Function alone: which blocks a token uses is fixed, and p is any numbers, not only a softmax."""
    made = routed(dense(kind), active=active, lora_rank=lora_rank, lora_alpha=3.0 if lora_rank else None)
    x = tokens(7)
    p = torch.rand(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    sent = dispatch(chosen_blocks(p.detach(), active), active)
    given = [None if t is None else t.detach().requires_grad_() for t in made._tensors()]
    wanted = [t for t in given if t is not None]

    def run(x: Tensor, p: Tensor, *some: Tensor) -> Tensor:
        rest = iter(some)
        tensors = [None if t is None else next(rest) for t in given]
        return run_products(x, p, sent, Work(made.layout, None, torch.float64), tensors)

    assert len(given) == len(PARTS) * len(made.layout.names)
    assert torch.autograd.gradcheck(run, (x, p, *wanted))


@kinds
def test_tokens_do_not_see_each_other(kind: str) -> None:
    made = routed(dense(kind), balance_loss=0.0)
    x, order = tokens(33).detach(), torch.randperm(33, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(made(x)[order], made(x[order]), atol=1e-13)
    assert torch.allclose(made(x)[5], made(x[5]), atol=1e-13)
    assert made(x.view(3, 11, WIDTH)).shape == (3, 11, OUT)
    strided = tokens(33, 2)[:, 0]
    assert torch.allclose(made(strided), made(strided.contiguous()), atol=1e-13)


def test_blocks_that_no_token_chooses_get_zero_gradients() -> None:
    made = routed(dense("gated"), active=1, lora_rank=0)
    nn.init.zeros_(made.router.weight)
    made.router.bias.data.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0]))
    found = gradients(made, made, tokens())
    assert_same(found, gradients(made.reference, made, tokens()))
    size = UNITS // 4
    for name in ("gate_weight", "up_weight", "gate_bias", "up_bias"):
        blocks = found[name].unflatten(0, (4, size)).flatten(1).abs().sum(1)
        assert blocks[1] > 0 and blocks[[0, 2, 3]].tolist() == [0, 0, 0]
    blocks = found["down_weight"].unflatten(1, (4, size)).abs().sum((0, 2))
    assert blocks[1] > 0 and blocks[[0, 2, 3]].tolist() == [0, 0, 0]
    assert made.load.tolist() == [0, 1, 0, 0]


@kinds
@ranks
def test_no_tokens_at_all(kind: str, lora_rank: int) -> None:
    made = routed(dense(kind), lora_rank=lora_rank)
    for shape in ((0, WIDTH), (2, 0, WIDTH)):
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        made.zero_grad()
        y = made(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], OUT) and x.grad is not None and x.grad.shape == shape
        assert all(not p.grad.any() for p in made.parameters() if p.requires_grad)
        assert float(made.balance_loss) == 0 and made.load.tolist() == [0.0] * 4


@kinds
@ranks
@pytest.mark.parametrize("trained", ["none", "router", "up", "down", "x"])
def test_what_is_frozen_gets_no_gradient(kind: str, lora_rank: int, trained: str) -> None:
    made = routed(dense(kind), lora_rank=lora_rank)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(trained in name)
    x = tokens().requires_grad_(trained == "x")
    y = made(x)
    assert y.requires_grad is (trained != "none")
    if trained == "none":
        return
    y.backward(upstream(y))
    ours = {n: p.grad for n, p in [*made.named_parameters(), ("x", x)] if p.grad is not None}
    assert ours and all(trained in name for name in ours)
    made.zero_grad()
    x.grad = None
    made.reference(x).backward(upstream(y))
    assert_same(ours, {n: p.grad for n, p in [*made.named_parameters(), ("x", x)] if p.grad is not None})


@kinds
@ranks
def test_half_precision_is_as_near_as_the_plain_operators(kind: str, lora_rank: int) -> None:
    made = routed(dense(kind), lora_rank=lora_rank).bfloat16()
    truth_of = copy.deepcopy(made).double()
    made.router.weight.data.mul_(8)  # no ties: rounding must not send a token elsewhere
    truth_of.router.weight.data.mul_(8)
    x = tokens(16, dtype=torch.bfloat16)
    ours, plain = gradients(made, made, x), gradients(made.reference, made, x)
    truth = gradients(truth_of.reference, truth_of, x.double())
    for name, exact in truth.items():
        assert ours[name].dtype == torch.bfloat16
        mine, theirs = ((found[name].double() - exact).norm() for found in (ours, plain))
        assert mine <= 2 * theirs + 2**-8 * exact.norm(), name
        assert mine <= 0.05 * exact.norm(), name


@kinds
@ranks
def test_autocast(kind: str, lora_rank: int) -> None:
    """As the reference under autocast, gradients in the weights' dtype; x is kept in half precision."""
    made = routed(dense(kind, torch.float32), lora_rank=lora_rank)
    x = tokens(40, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = gradients(made, made, x), gradients(made.reference, made, x)
        y = made(x)
    assert y.dtype == torch.bfloat16
    assert {t.dtype for name, t in ours.items() if name != "y"} == {torch.float32}
    assert_same(ours, expected, tolerance=0.03)
    with torch.autocast("cpu", torch.bfloat16):
        kept = memsave.saved_bytes(lambda: made(x))
    assert kept == made.kept_bytes(x.shape, torch.bfloat16)


@kinds
@actives
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_kept_bytes_are_as_stated(kind: str, active: int, dtype: torch.dtype) -> None:
    made = routed(dense(kind, dtype), active=active)
    x = tokens(5, 11, dtype=dtype)
    n, size, units = 55, dtype.itemsize, UNITS // 4
    pre = (1 if kind in ("plain", "conv1d") else 2) * n * active * units * size
    expected = n * WIDTH * size + pre + n * 4 * max(4, size) + 4 * n * active + 4 * 4
    assert made.kept_bytes(x.shape, dtype) == expected == memsave.saved_bytes(lambda: made(x))
    with torch.no_grad():
        assert memsave.saved_bytes(lambda: made(x)) == 0


@kinds
@actives
def test_flops_are_as_stated(kind: str, active: int) -> None:
    made = routed(dense(kind), active=active)
    x = tokens(5, 11)
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as counter, torch.no_grad():
        made(x.detach())
    products = 2 if kind in ("plain", "conv1d") else 3
    of_units = 55 * active * (UNITS // 4) * (WIDTH * (products - 1) + OUT)
    assert counter.get_total_flops() == made.flops(x.shape) == 2 * (of_units + 55 * WIDTH * 4)
    with FlopCounterMode(display=False, custom_mapping=COUNTED_TOO) as counter:
        y = made(x)
        y.backward(upstream(y))
    assert counter.get_total_flops() == 3 * made.flops(x.shape)  # nothing is multiplied again in backward


def test_what_is_kept_goes_through_save_for_backward() -> None:
    made = routed(dense("gated"))
    h = tokens() * 1
    storage = StorageWeakRef(h.untyped_storage())
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        node = made(h).grad_fn
    del h
    assert node is not None and storage.expired()


def test_weights_that_change_before_backward_are_noticed() -> None:
    made = routed(dense("plain"))
    y = made(tokens())
    made.up_weight.data = made.up_weight.data.clone()
    with torch.no_grad():
        made.down_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(upstream(y))


def test_second_derivatives_raise() -> None:
    made = routed(dense("gated"))
    x = tokens()
    (dx,) = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.sum().backward()


@kinds
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(kind: str, use_reentrant: bool) -> None:
    made = routed(dense(kind), balance_loss=0.5)
    expected = gradients(made, made, tokens())
    loss = made.balance_loss
    run = partial(checkpoint, made, use_reentrant=use_reentrant)
    ours = gradients(lambda x: run(x), made, tokens())
    assert_same(ours, expected, tolerance=0.0)
    assert torch.equal(made.balance_loss, loss)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_output_is_the_same(mode: Any) -> None:
    made = routed(dense("gated"))
    y = made(tokens())
    with mode():
        assert torch.equal(made(tokens().detach()), y) and made.load is not None


@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_compiled_models_compute_the_same(kind: str) -> None:
    torch._dynamo.reset()
    made = routed(dense(kind), balance_loss=0.5)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH).double(), made)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(gradients(compiled, model, tokens()), gradients(model, model, tokens()))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="aot_eager", fullgraph=True)(tokens())


def test_tracers_and_transforms_get_plain_operators() -> None:
    made = routed(dense("gated")).eval()
    x = tokens().detach()
    traced = torch.jit.trace(made, (x,))
    other = tokens(2, 9, seed=8).detach()
    assert torch.allclose(traced(other), made(other))
    assert torch.allclose(torch.func.vmap(made)(x), made(x))
    exported = torch.export.export(made, (x,)).module()
    other = tokens(*x.shape[:-1], seed=8).detach()
    assert torch.allclose(exported(other), made(other))


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("kind", ["gated", "fused", "plain"])
@actives
def test_the_grouped_product_gives_what_the_loop_gives(kind: str, active: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves on a GPU alone; torch's own way on the CPU shows that it is called with the right things."""
    plain = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    if kind != "plain":
        plain = dense(kind, torch.float32)  # type: ignore[assignment]
        linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
        for linear in linears:
            fused = kind == "fused" and linear is linears[0]
            outputs, inputs = (16, 64) if linear is linears[-1] else (128 if fused else 64, 16)
            linear.in_features, linear.out_features = inputs, outputs
            linear.weight = nn.Parameter(torch.randn(outputs, inputs) * 0.3)
            linear.bias = None if linear.bias is None else nn.Parameter(torch.randn(outputs) * 0.3)
    made = routed(plain, active=active).bfloat16()
    x = torch.randn(40, 16).bfloat16()
    expected = gradients(made, made, x)
    calls = []
    monkeypatch.setattr(grouped, "forced", True)
    monkeypatch.setattr(
        grouped.F, "grouped_mm", lambda *a, _f=grouped.F.grouped_mm, **k: calls.append(1) or _f(*a, **k)
    )
    assert_same(gradients(made, made, x), expected, tolerance=0.03)
    assert len(calls) == (4 if kind == "plain" else 6) + (2 if kind == "plain" else 3)


@settings(max_examples=40)
@given(
    num_tokens=st.integers(0, 20),
    blocks=st.integers(1, 5),
    size=st.integers(1, 4),
    data=st.data(),
)
def test_any_sizes(num_tokens: int, blocks: int, size: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, blocks))
    width, out = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model: Any = nn.Sequential(nn.Sequential(nn.Linear(width, blocks * size), nn.ReLU(), nn.Linear(blocks * size, out)))
    memsave.convert_model(model.double(), RoutedFFNConfig(target_modules=["0"], blocks=blocks, active=active))
    made = model[0]
    nn.init.normal_(made.router.weight)
    x = torch.randn(num_tokens, width, dtype=torch.float64)
    assert_same(gradients(made, made, x), gradients(made.reference, made, x)) if num_tokens else made(x)
    assert memsave.saved_bytes(lambda: made(x)) == made.kept_bytes(x.shape, torch.float64)
