"""Sampling with remembered gradient norms: what rows are drawn by, that it is unbiased, and what is remembered.

x (B, T, D), dy (B, T, O): B samples of T tokens.
"""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import ops
from memsave.nn import grad_norms
from memsave.nn.rows import KeepRows

from .linears import ESTIMATORS, OUT, D, last_weight_grad
from .remembered import IDS, KEEP_RATIO, B, T, cached, caches, data, factors, linear, rounded, visit
from .test_wta_crs import deviations, pps_variance

pytestmark = pytest.mark.usefixtures("fresh_memory")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_second_visit_draws_by_both_norms(estimator: str) -> None:
    model, (x, dy) = cached(linear(), estimator=estimator), data()
    visit(model, IDS, x, dy)
    again = [2, 0, 9]  # two known samples in another order, and a new one
    new_x, new_dy = data(samples=3, seed=1)
    torch.manual_seed(5)
    with memsave.sample_ids(again):
        found = last_weight_grad(model, new_x, new_dy)
    known = rounded(dy.norm(dim=-1))
    expected_factors = torch.stack([known[IDS.index(2)], known[IDS.index(0)], torch.ones(T)])
    assert expected_factors.max() > 4 and expected_factors.min() < 0.6
    torch.manual_seed(5)
    flat_x, flat_dy = new_x.flatten(0, 1), new_dy.flatten(0, 1)
    rows, scale = KeepRows(KEEP_RATIO, 1, estimator).draw(flat_x, ops.new_seed(flat_x), expected_factors.flatten())
    assert torch.equal(found, ops.sampled_matmul(flat_dy, flat_x[rows.long()], rows, scale))


def test_the_first_visit_draws_as_without_a_memory() -> None:
    x, dy = data()
    found = []
    for settings in ({}, {"grad_norms": "none"}):
        model = cached(linear(), **settings)
        torch.manual_seed(3)
        with memsave.sample_ids(IDS):
            found.append(last_weight_grad(model, x, dy))
    assert torch.equal(*found)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("visits", [0, 1])
def test_zero_norms_do_not_bias(visits: int, estimator: str) -> None:
    """The paper's released code skips the scale where a sample's norms are all zero, as at every first visit.

    Here the norms are unknown, or zero for a sample, for half of another one, and not for the rest.
    """
    model, (x, dy) = cached(linear(), estimator=estimator), data(spread=0.5)
    if visits:
        stale = dy.clone()
        stale[0], stale[1, : T // 2] = 0, 0
        visit(model, IDS, x, stale)
        assert (factors(model, IDS) == 1 / 16).sum() == T + T // 2
    with memsave.sample_ids(IDS):
        draws = torch.stack([last_weight_grad(model, x, dy) for _ in range(1000)])
    found = deviations(draws, dy.flatten(0, 1).t() @ x.flatten(0, 1))
    assert max(found.values()) < 4, found


def test_the_variance_falls_towards_that_of_the_best_probabilities() -> None:
    """At the second visit of data whose gradient norms differ; the closed form is Hajek's for the weights in use."""
    model, (x, dy) = cached(linear()), data(tokens=64, spread=1.0)
    flat_x, flat_dy = x.flatten(0, 1), dy.flatten(0, 1)
    exact, k = flat_dy.t() @ flat_x, int(KEEP_RATIO * B * 64)

    def variance() -> float:
        with memsave.sample_ids(IDS):
            draws = torch.stack([last_weight_grad(model, x, dy) for _ in range(1500)])
        return float((draws - exact).square().sum(dim=(1, 2)).mean())

    def closed_form(factors: Tensor) -> float:
        return float(pps_variance(flat_x.double(), flat_dy.double(), k, flat_x.norm(dim=1) * factors))

    norms = flat_dy.norm(dim=1)
    by_x, mixed, best = (closed_form(f) for f in (torch.ones(B * 64), (1 + norms / norms.mean()) / 2, norms))
    assert best < mixed < 1.5 * best < 0.5 * by_x, (best, mixed, by_x)
    assert variance() == pytest.approx(by_x, rel=0.1)
    assert variance() == pytest.approx(mixed, rel=0.1)


def test_siblings_remember_the_root_of_the_sum_of_squares_once() -> None:
    class Siblings(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(D, OUT) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)

    model, (x, _) = cached(Siblings()), data()
    dy = torch.cat([data(seed=seed)[1] for seed in range(3)], dim=-1)
    visit(model, IDS, x, dy)
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))
    assert [cache.codes.numel() for cache in caches(model)] == [8 * T, 0, 0]
    assert memsave.sample_cache_bytes(model) == 8 * T


def test_samples_in_any_order_and_number_are_told_apart() -> None:
    """Two epochs in two orders, the last batch ragged: each sample has the norms of its own last visit."""
    model = cached(linear())
    x, dy = data(samples=10)
    for epoch in range(2):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch))
        for ids in order.split(4):
            visit(model, ids.tolist(), x[ids], (1 + epoch) * dy[ids] ** (1 + epoch))
    for ids in order.split(4):
        assert torch.equal(factors(model, ids.tolist()), rounded(dy[ids].square().norm(dim=-1)))


def test_samples_of_other_lengths_in_other_epochs() -> None:
    model = cached(linear())
    first, longer, shorter = data()[1], data(tokens=T + 3, seed=1)[1], data(tokens=T - 5, seed=2)[1]
    visit(model, IDS, data()[0], first)
    assert torch.equal(factors(model, IDS, T + 3), nn.functional.pad(rounded(first.norm(dim=-1)), (0, 3), value=1.0))
    visit(model, IDS, data(tokens=T + 3)[0], longer)
    assert torch.equal(factors(model, IDS, T + 3), rounded(longer.norm(dim=-1)))
    visit(model, IDS, data(tokens=T - 5)[0], shorter)
    expected = torch.cat([rounded(shorter.norm(dim=-1)), rounded(longer.norm(dim=-1))[:, T - 5 :]], dim=1)
    assert torch.equal(factors(model, IDS, T + 3), expected)


def test_a_sample_twice_in_a_batch_has_the_norms_of_its_last_place() -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, [3, 1, 3, 0], x, dy)
    assert torch.equal(factors(model, [1, 3, 0]), rounded(dy.norm(dim=-1))[1:])


@pytest.mark.parametrize("folded", [False, True])
def test_rows_may_be_folded_into_one_dimension(folded: bool) -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, *((x.flatten(0, 1), dy.flatten(0, 1)) if folded else (x.unsqueeze(2), dy.unsqueeze(2))))
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


@pytest.mark.parametrize("power", [-16, -2, 16])
def test_loss_scaling_and_accumulation_factors_cancel_bit_for_bit(power: int) -> None:
    found = []
    for factor in (1.0, 2.0**power):
        model, (x, dy) = cached(linear()), data()
        visit(model, IDS, x, factor * dy)
        found.append(factors(model, IDS))
    assert torch.equal(*found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_overflow_is_not_remembered(value: float) -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    overflown = data(seed=1)[1]
    overflown[2, 3, 1] = value
    visit(model, IDS, x, overflown)
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_a_gradient_scaler_that_overflows_and_goes_on() -> None:
    model, (x, dy) = cached(linear()), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    for _ in range(12):  # halved at every overflow, until it fits
        with memsave.sample_ids(IDS):
            scaler.scale((model(x) * dy).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**126
    # The squares of what did fit may have overflown: such visits are lost too.
    with memsave.sample_ids(IDS):
        (model(x) * dy).sum().backward()
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_micro_batches_are_remembered_apart() -> None:
    """In two blocks, forward and backward in turn or both forwards first; each over its own mean."""
    x, dy = data()
    expected = torch.cat([rounded(part.norm(dim=-1)) for part in dy.split(2)])
    for together in (False, True):
        model = cached(linear())
        losses = []
        for ids, part_x, part_dy in zip((IDS[:2], IDS[2:]), x.split(2), (dy / 2).split(2), strict=True):
            with memsave.sample_ids(ids):
                losses.append((model(part_x) * part_dy).sum())
                if not together:
                    losses[-1].backward()
        if together:
            torch.stack(losses).sum().backward()
        assert torch.equal(factors(model, IDS), expected)


def test_a_linear_that_runs_twice_adds_its_squares_up() -> None:
    model, (x, dy) = cached(linear()), data()
    other_x, other_dy = data(seed=1)
    with memsave.sample_ids(IDS):
        ((model(x) * dy).sum() + (model(other_x) * other_dy).sum()).backward()
    both = (dy.norm(dim=-1).square() + other_dy.norm(dim=-1).square()).sqrt()
    torch.testing.assert_close(factors(model, IDS), rounded(both))


def test_two_backward_passes_remember_what_one_does() -> None:
    model, (x, dy) = cached(linear()), data()
    with memsave.sample_ids(IDS):
        y = model(x)
        y.backward(dy, retain_graph=True)
        y.backward(dy)
    torch.testing.assert_close(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_a_frozen_weight_remembers_nothing_until_it_is_trained() -> None:
    model, (x, dy) = cached(linear()), data()
    model[0].weight.requires_grad_(False)
    visit(model, IDS, x.requires_grad_(), dy)
    grad_norms.remember()
    assert memsave.sample_cache_bytes(model) == 0
    model[0].weight.requires_grad_(True)
    visit(model, IDS, x, dy)
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


@pytest.mark.parametrize("quiet", ["eval", "no_grad"])
def test_evaluation_remembers_nothing_and_needs_no_ids(quiet: str) -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    with torch.set_grad_enabled(quiet != "no_grad"):
        y = model.train(quiet != "eval")(x)
        with memsave.sample_ids(IDS):
            assert torch.equal(model(x), y)
    assert torch.equal(factors(model, IDS), rounded(dy.norm(dim=-1)))


def test_lora_remembers_for_lora_a_alone() -> None:
    plain = peft.get_peft_model(
        nn.Sequential(nn.Linear(D, OUT)), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    model = cached(plain.train(), target_modules=r".*lora_A.*")
    x, dy = data()
    visit(model, IDS, x, dy)
    (name,) = (name for name, module in model.named_modules() if "_memsave_grad_norms" in vars(module))
    assert "lora_A" in name
    upstream = dy @ model.get_submodule(name.replace("lora_A", "lora_B")).weight * (8 / 2)
    torch.testing.assert_close(factors(model, IDS), rounded(upstream.norm(dim=-1)))


def test_a_visit_keeps_what_the_formula_says() -> None:
    model, (x, dy) = cached(linear()), data()
    visit(model, IDS, x, dy)
    with memsave.sample_ids(IDS):
        assert memsave.saved_bytes(lambda: model(x)) == model[0].kept_bytes(x.shape, x.dtype)
