"""Clusters of equal size, and routers fitted to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import memsave
from memsave import RoutedFFNConfig
from memsave.nn.routed_ffn import fitting
from memsave.nn.routed_ffn.clustering import balanced, clustered
from memsave.nn.routed_ffn.fitting import fit_routing

from .toys import Planted, dense, routed


def recall(group: Tensor, order: Tensor, blocks: int) -> float:
    """Which part of the pairs of units of one group is in one block."""
    sorted_groups = group[order].view(blocks, -1)
    counts = torch.stack([(sorted_groups == g).sum(1) for g in range(blocks)]).double()
    size = sorted_groups.shape[1]
    return float((counts * (counts - 1)).sum() / (blocks * size * (size - 1)))


@given(blocks=st.integers(1, 6), size=st.integers(1, 7), seed=st.integers(0, 99))
def test_every_block_gets_equally_many(blocks: int, size: int, seed: int) -> None:
    scores = torch.randn(blocks * size, blocks, generator=torch.Generator().manual_seed(seed))
    assert balanced(scores, size).bincount(minlength=blocks).tolist() == [size] * blocks
    order = clustered(torch.rand(9, blocks * size, generator=torch.Generator().manual_seed(seed)), blocks)
    assert order.sort().values.tolist() == list(range(blocks * size))


def test_a_block_that_many_want_takes_those_that_would_lose_most() -> None:
    scores = torch.tensor([[5.0, 4.9], [5.0, 0.0], [4.0, 1.0], [6.0, 5.5]])
    assert balanced(scores, 2).tolist() == [1, 0, 0, 1]


def test_units_that_are_in_order_stay() -> None:
    """Where groups follow on each other, nothing is moved; units that are never active fill what is left."""
    patterns = torch.block_diag(torch.ones(5, 3), torch.ones(5, 3), torch.zeros(5, 2))[:, :8]
    assert clustered(torch.block_diag(torch.ones(5, 3), torch.ones(5, 3)), 2).tolist() == list(range(6))
    assert {frozenset(part) for part in clustered(patterns, 2).view(2, 4)[:, :3].tolist()} == {
        frozenset((0, 1, 2)), frozenset((3, 4, 5))
    }  # fmt: skip
    assert clustered(torch.zeros(4, 6), 3).sort().values.tolist() == list(range(6))


@pytest.mark.parametrize("seed", range(3))
def test_planted_groups_are_found(seed: int) -> None:
    """All pairs of units that are active together share a block; by their places it would be about a quarter."""
    block = Planted(seed=seed)
    batches = [block.inputs(300, seed) for seed in range(4)]
    found = fit_routing(nn.Sequential(block), {"block": block}, batches, 4, None)["block"]
    assert recall(block.group, found.order, 4) == 1.0
    assert recall(block.group, torch.arange(64), 4) < 0.35


def relative_error(module: nn.Module, block: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        exact = block(x)
        return float((module(x) - exact).square().sum() / (exact - exact.mean(0)).square().sum())


@pytest.mark.parametrize("active", [1, 2])
def test_a_fitted_router_is_far_better_than_a_random_one(active: int) -> None:
    """Each token needs the one block of its kind: with it, next to nothing is lost; without it, nearly everything."""
    block = Planted()
    x = block.inputs(1000, 9)
    fitted = routed(
        copy.deepcopy(block), [block.inputs(500, s) for s in range(3)], active=active, clustering="coactivation"
    )
    random = copy.deepcopy(fitted)
    torch.manual_seed(0)
    random.router.reset_parameters()
    contiguous: Any = nn.Sequential(copy.deepcopy(block))
    memsave.convert_model(contiguous, RoutedFFNConfig(target_modules=["0"], active=active))
    errors = [relative_error(m, block, x) for m in (fitted, random, contiguous)]
    assert errors[0] < 0.05
    assert errors[0] < 0.2 * min(errors[1:]), errors


def test_a_fitted_router_predicts_shares_where_inputs_are_far_from_zero() -> None:
    """A large common part of all inputs must not hide what differs."""
    block = Planted()
    shift = 30 * torch.ones(32)
    with torch.no_grad():
        block.up.bias -= block.up.weight @ shift
    batches = [block.inputs(500, s) + shift for s in range(3)]
    made = routed(copy.deepcopy(block), batches, active=1, clustering="coactivation")
    x = block.inputs(1000, 9) + shift
    assert relative_error(made, block, x) < 0.05
    p = made.router(x)
    assert 0.005 < (p.log() - p.log().mean(1, keepdim=True)).square().mean().sqrt() < 0.05


def test_fitted_scores_are_small_because_larger_ones_only_distort(monkeypatch: pytest.MonkeyPatch) -> None:
    """c = G p near 1 keeps what is active as it was; the choice of the blocks is the same at every scale."""
    block = Planted()
    batches, x = [block.inputs(500, s) for s in range(3)], block.inputs(1000, 9)
    errors, loads = [], []
    for scale in (0.02, 0.5):
        monkeypatch.setattr(fitting, "SCORE_SCALE", scale)
        made = routed(copy.deepcopy(block), batches, active=2, clustering="coactivation")
        errors.append(relative_error(made, block, x))
        loads.append(made.load)
    assert torch.equal(*loads) and errors[0] < 0.2 * errors[1], errors


def test_a_router_is_fitted_to_blocks_that_serve_unequally() -> None:
    """Its bias knows what is active on average, whatever the input."""
    block = Planted()
    with torch.no_grad():
        block.up.bias[block.group == 2] = 8.0
    made = routed(copy.deepcopy(block), [block.inputs(500, s) for s in range(3)], active=1, clustering="coactivation")
    always = int(block.group[made.unit_order.view(4, -1)].eq(2).sum(1).argmax())
    made(block.inputs(500, 9))
    assert made.load[always] > 0.95


@pytest.mark.parametrize("kind", ["gated", "fused", "plain", "conv1d"])
def test_shares_are_those_of_the_blocks_own_forward(kind: str) -> None:
    block = dense(kind, torch.float32)
    down = next(m for m in reversed(list(block.modules())) if getattr(m, "weight", None) is not None)
    seen: list[Tensor] = []
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.randn(11, 6)
    block(x)
    weight = down.weight if kind == "conv1d" else down.weight.t()  # (F, O)
    energy = seen[0].square() * weight.detach().square().sum(1)
    shares = fitting._Activity(block, 4).shares(x)
    assert torch.allclose(shares, energy / energy.sum(1, keepdim=True), atol=1e-6)


def test_samples_are_evenly_spaced_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "SAMPLED_TOKENS", 8)
    sample, number = fitting._Sample(), 0
    for size in (5, 1, 0, 30, 64, 3):
        rows = torch.arange(number, number + size)[:, None]
        sample.add(rows[sample.wanted(size)])
        number += size
    kept = sample.rows()[:, 0].tolist()
    assert 8 <= len(kept) < 16 and sample.seen == 103
    assert len({b - a for a, b in zip(kept, kept[1:], strict=False)}) == 1 and kept[0] == 0


def test_passes_follow_the_budget_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Planted(), nn.LayerNorm(32), Planted(seed=1), nn.LayerNorm(32), Planted(seed=2))
    targets = {str(i): model[i] for i in (0, 2, 4)}
    batches = [torch.randn(64, 32) for _ in range(3)]
    passes: list[int] = []
    monkeypatch.setattr(fitting, "_pass", lambda *a, _f=fitting._pass: passes.append(len(a[3])) or _f(*a))
    one = fit_routing(model, targets, batches, 4, 2**30)
    assert passes == [3, 3]
    passes.clear()
    many = fit_routing(model, targets, batches, 4, None)
    assert passes == [1] * 6
    for name in targets:
        assert all(torch.equal(a, b) for a, b in zip(one[name], many[name], strict=True))


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(Planted(), nn.Dropout(0.5)).train()
    model[1].eval()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    fit_routing(model, {"0": model[0]}, [torch.randn(8, 32, generator=torch.Generator().manual_seed(0))], 4, None)
    assert torch.equal(torch.get_rng_state(), state) and model.training and not model[1].training
    assert not model[0]._forward_pre_hooks and all(p.grad is None for p in model.parameters())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Planted()

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        return self.block(x) if use else x


def stream() -> Iterator[Tensor]:
    yield torch.randn(4, 32)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (torch.randn(4, 32), "expected an iterable of batches, such as a list, got Tensor"),
        (stream(), r"a one-shot iterator \(generator\), but clustering and fitting need a pass each"),
        ([], "expected at least one batch, got none"),
        ([(torch.randn(4, 32), False)], "no batch reaches block"),
        ([torch.zeros(0, 32)], "no batch reaches block"),
        ([torch.full((4, 32), torch.inf)], "the input of block is not finite"),
    ],
)
def test_batches_that_are_of_no_use(batches: Any, message: str) -> None:
    model = TwoInputs()
    with pytest.raises(ValueError, match=f"^convert_model: calibration: batches: {message}.*not changed"):
        memsave.convert_model(
            model, RoutedFFNConfig(target_modules=["block"], clustering="coactivation"), calibration=batches
        )
    assert type(model.block) is Planted and not model.block._forward_pre_hooks
