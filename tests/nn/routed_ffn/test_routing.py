"""The router, the sorting of tokens, and the balance loss."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from memsave.nn.routed_ffn import set_balance_scale
from memsave.nn.routed_ffn.routing import Balance, Router, chosen_blocks, dispatch, spans

from .toys import WIDTH, assert_same, dense, gradients, routed, tokens, upstream


def router(dtype: torch.dtype = torch.float64, blocks: int = 4) -> Router:
    torch.manual_seed(0)
    made = Router(WIDTH, blocks, dtype=dtype)
    nn.init.normal_(made.weight)
    nn.init.normal_(made.bias)
    return made


def test_probabilities_and_their_gradients() -> None:
    made = router()
    assert_same(gradients(made, made, tokens(9)), gradients(made.reference, made, tokens(9)), tolerance=1e-14)
    assert torch.autograd.gradcheck(made, tokens(5))


def test_probabilities_of_half_precision_inputs_are_those_of_float32() -> None:
    made, x = router(torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    wide = copy.deepcopy(made).float()
    with torch.autocast("cpu", torch.bfloat16):
        p = made(x)
    assert p.dtype == torch.float32 and torch.equal(p, wide(x.float()))
    assert_same(gradients(made, made, x), gradients(made.reference, made, x), tolerance=0.02)


def test_half_precision_inputs_are_widened_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = router(torch.bfloat16), tokens(9, dtype=torch.bfloat16)
    expected = gradients(made, made, x)
    monkeypatch.setattr("memsave.nn.routed_ffn.routing._ENTRIES_AT_ONCE", 2 * WIDTH)
    assert_same(gradients(made, made, x), expected, tolerance=0.01)


def test_a_new_router_scores_tokens_differently_but_all_blocks_nearly_alike() -> None:
    torch.manual_seed(0)
    made = Router(512, 4, dtype=torch.float32)
    made.reset_parameters()
    p = made(torch.randn(2000, 512))
    assert (p - 0.25).abs().max() < 0.15 and 0.08 < p.log().std() < 0.12
    assert (chosen_blocks(p, 2).float().mean(0) - 0.5).abs().max() < 0.1


def test_of_equal_probabilities_the_first_blocks_are_chosen() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4]])
    assert chosen_blocks(p, 1).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    assert chosen_blocks(p, 3).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert chosen_blocks(p, 4).all()


@given(num_tokens=st.integers(0, 30), blocks=st.integers(1, 6), data=st.data())
def test_tokens_are_sorted_by_block_and_keep_their_order(num_tokens: int, blocks: int, data: st.DataObject) -> None:
    active = data.draw(st.integers(1, blocks))
    p = torch.rand(num_tokens, blocks, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    chosen = chosen_blocks(p, active)
    sent = dispatch(chosen, active)
    assert sent.tokens.dtype == sent.counts.dtype == torch.int32 and len(sent.tokens) == num_tokens * active
    assert sent.tokens.untyped_storage().nbytes() == 4 * num_tokens * active
    for block, place in enumerate(spans(sent.counts, len(sent.tokens))):
        assert sent.tokens[place].tolist() == chosen[:, block].nonzero()[:, 0].tolist()


def test_tensors_without_values_count_as_balanced() -> None:
    with FakeTensorMode():
        counts = torch.zeros(4, dtype=torch.int32)
    assert [place.stop - place.start for place in spans(counts, 10)] == [3, 3, 2, 2]
    assert spans(counts, 10)[-1].stop == 10


@pytest.mark.parametrize("active", [1, 2])
def test_the_balance_loss_is_least_where_blocks_serve_equally_many(active: int) -> None:
    """alpha at uniform load and p, more at any other where the load follows p."""
    balance = Balance(0.01)
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    balance.note(uniform, torch.full((4,), 2 * active, dtype=torch.int32))
    assert float(balance.value) == pytest.approx(0.01) and balance.load.tolist() == [0.25] * 4  # type: ignore[arg-type, union-attr]
    for seed in range(20):
        scores = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + torch.arange(
            4
        )
        p = scores.softmax(-1)
        balance.note(p, dispatch(chosen_blocks(p, active), active).counts)
        assert float(balance.value) > 0.0101  # type: ignore[arg-type]


def test_the_balance_loss_is_what_is_logged_and_its_gradient_is_added() -> None:
    """Beside the same block without it, whose loss is added explicitly."""
    made = routed(dense("gated"), balance_loss=0.7)
    bare = routed(dense("gated"), balance_loss=0.0)
    bare.load_state_dict(made.state_dict())
    x = tokens()
    ours = gradients(made, made, x)
    x = x.detach().clone().requires_grad_()
    y = bare(x)
    p = bare.router.reference(x.reshape(-1, WIDTH))
    share = chosen_blocks(p, 2).double().mean(0) / 2
    loss = 0.7 * 4 * (share * p.mean(0)).sum()
    torch.autograd.backward([y, loss], [upstream(y), torch.ones(()).double()])
    expected = {n: w.grad for n, w in [("x", x), *bare.named_parameters()] if w.grad is not None}
    assert_same(ours, {"y": y.detach(), **expected})
    assert torch.allclose(made.balance_loss, loss.detach()) and not made.balance_loss.requires_grad
    assert torch.allclose(made.load, share) and float(made.load.sum()) == pytest.approx(1)
    plain = gradients(bare, bare, x)
    assert (ours["router.weight"] - plain["router.weight"]).abs().max() > 1e-3


def test_training_by_the_balance_loss_alone_evens_the_load() -> None:
    made = routed(dense("plain"), active=1, balance_loss=1.0)
    x = tokens(400).detach()
    made.router.bias.data.copy_(torch.tensor([4.0, 0.0, 0.0, 0.0]))
    optimizer = torch.optim.Adam(made.router.parameters(), lr=0.05)
    made(x)
    assert made.load.max() > 0.6
    for _ in range(150):
        optimizer.zero_grad()
        y = made(x)
        y.backward(torch.zeros_like(y))
        optimizer.step()
    assert made.load.max() < 0.35


def test_the_scale_multiplies_the_balance_gradient_alone() -> None:
    made = routed(dense("gated"), balance_loss=0.7)
    model = nn.Sequential(made)
    at = {}
    for scale in (0.0, 1.0, 1024.0):
        y = model(tokens())
        set_balance_scale(model, scale)  # backward reads it
        made.zero_grad()
        y.backward(upstream(y))
        at[scale] = {name: p.grad.clone() for name, p in made.named_parameters()}
    for name in at[0.0]:
        one, many = (at[scale][name] - at[0.0][name] for scale in (1.0, 1024.0))
        assert torch.allclose(many, 1024 * one, atol=1e-9), name
        assert ("router" in name) == bool(one.abs().max() > 1e-9)
    set_balance_scale(model, 0.0)
    assert_same(gradients(made, made, tokens()), gradients(made.reference, made, tokens()))


def test_evaluation_adds_no_balance_gradient() -> None:
    made, bare = routed(dense("gated"), balance_loss=0.7), routed(dense("gated"), balance_loss=0.0)
    bare.load_state_dict(made.state_dict())
    assert_same(gradients(made.eval(), made, tokens()), gradients(bare, bare, tokens()), tolerance=0.0)
    assert made.balance_loss is not None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_the_balance_loss_once(use_reentrant: bool) -> None:
    made = routed(dense("gated"), balance_loss=0.7)
    direct = gradients(made, made, tokens())
    loss, load = made.balance_loss, made.load
    twice = gradients(partial(checkpoint, made, use_reentrant=use_reentrant), made, tokens())
    assert_same(twice, direct, tolerance=0.0)
    assert torch.equal(made.balance_loss, loss) and torch.equal(made.load, load)
