"""A and B against torch's SVD, and LaMDA++'s ranks: exact sums, monotone in the energy."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave.errors import UnsupportedModelError
from memsave.integrations.peft.lamda import energy_ranks, rank_pattern_for
from memsave.integrations.peft.lamda.decomposition import decompose, energy

from .lamda_models import OUT, RANK, Conv1DBlock, D, adapted, block, config, layers


def decaying(rate: float = 0.7) -> Tensor:
    """(D, OUT) with singular values 1, rate, rate^2, ..."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(OUT, D, generator=generator))[0]
    return (u * rate ** torch.arange(D)) @ v.t()


@pytest.mark.parametrize(("svd", "tolerance"), [("exact", 1e-5), ("randomized", 1e-3)])
def test_a_and_b_are_the_top_singular_vectors(svd: str, tolerance: float) -> None:
    matrix = decaying()
    a, b, sigma = decompose(matrix, RANK, config(svd=svd))
    assert a.shape == (D, RANK) and b.shape == (RANK, OUT)
    torch.testing.assert_close(a.t() @ a, torch.eye(RANK), rtol=0, atol=1e-5)
    torch.testing.assert_close(b @ b.t(), torch.eye(RANK), rtol=0, atol=1e-5)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(sigma, s[:RANK], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close((a * u[:, :RANK]).sum(0).abs(), torch.ones(RANK), rtol=0, atol=tolerance)
    torch.testing.assert_close((b * vt[:RANK]).sum(1).abs(), torch.ones(RANK), rtol=0, atol=tolerance)
    # One sign for both: A Sigma B is the best approximation of rank r.
    torch.testing.assert_close((a * sigma) @ b, (u[:, :RANK] * s[:RANK]) @ vt[:RANK], rtol=0, atol=tolerance)
    assert (a.gather(0, a.abs().argmax(0, keepdim=True)) > 0).all()
    assert (sigma.diff() <= 0).all()


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_the_same_at_every_run_and_torchs_random_state_is_left_alone(svd: str) -> None:
    state = torch.get_rng_state()
    first = decompose(decaying(), RANK, config(svd=svd, seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = decompose(decaying().clone(), RANK, config(svd=svd, seed=3))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    if svd == "randomized":
        assert not torch.equal(decompose(decaying(), RANK, config(svd=svd, seed=4)).a, first.a)


@pytest.mark.parametrize("kind", [block, Conv1DBlock])
def test_layers_hold_the_factors_of_their_weight(kind: type) -> None:
    model = adapted(kind(), target_modules=["up"])
    (layer,) = layers(model)
    weight = layer.base_layer.weight
    matrix = weight.t() if kind is block else weight  # (D, OUT)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    a, b = layer.memsave_lamda_A["default"], torch.cat(layer.segments("default"))
    torch.testing.assert_close((a * u[:, :RANK]).sum(0).abs(), torch.ones(RANK), rtol=0, atol=1e-4)
    torch.testing.assert_close((b * vt[:RANK]).sum(1).abs(), torch.ones(RANK), rtol=0, atol=1e-4)


def test_the_full_rank_and_rank_one() -> None:
    for rank in (1, D):
        model = adapted(r=rank)
        assert [len(layer.segments("default")) for layer in layers(model)] == [min(rank, 8)] * 2


def test_energy_is_the_share_of_the_squares() -> None:
    matrix = decaying(0.5)
    s = torch.linalg.svdvals(matrix)
    expected = float(s[:3].square().sum() / s.square().sum())
    for svd in ("exact", "randomized"):
        assert energy(matrix, 3, config(svd=svd)) == pytest.approx(expected, abs=1e-5)
    assert energy(torch.zeros(4, 4), 2, config()) == 1.0
    assert energy(matrix, D, config()) == pytest.approx(1.0)


@given(
    energies=st.lists(st.floats(0, 1), min_size=1, max_size=30),
    r=st.integers(1, 64),
    spread=st.tuples(st.integers(0, 64), st.integers(0, 200)),
)
@settings(max_examples=300, deadline=None)
def test_ranks_add_up_and_are_monotone(energies: list[float], r: int, spread: tuple[int, int]) -> None:
    low, high = max(1, r - spread[0]), r + spread[1]
    ranks = energy_ranks(energies, r, [(low, high)] * len(energies))
    assert sum(ranks) == r * len(energies)
    assert all(low <= rank <= high for rank in ranks)
    for first, second in zip(energies, ranks, strict=True):
        assert all(second >= rank for e, rank in zip(energies, ranks, strict=True) if e > first)
    assert ranks == energy_ranks(energies, r, [(low, high)] * len(energies))


@given(
    layers=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.integers(0, 40)), min_size=1, max_size=20),
    r=st.integers(1, 32),
)
@settings(max_examples=200, deadline=None)
def test_ranks_add_up_within_limits_of_their_own(layers: list[tuple[float, int, int]], r: int) -> None:
    limits = [(max(1, r - below), r + above) for _, below, above in layers]
    ranks = energy_ranks([e for e, _, _ in layers], r, limits)
    assert sum(ranks) == r * len(layers)
    assert all(low <= rank <= high for rank, (low, high) in zip(ranks, limits, strict=True))


@pytest.mark.parametrize(
    ("energies", "r", "limits", "expected"),
    [
        ([1.0, 1.0, 1.0], 4, (1, 8), [4, 4, 4]),
        ([0.5, 0.5], 4, (1, 8), [4, 4]),
        ([0.9, 0.7], 4, (1, 8), [2, 6]),
        ([0.9, 0.7, 0.5], 4, (1, 12), [1, 4, 7]),  # 1.33, 4, 6.67
        ([0.99, 0.1], 8, (2, 16), [2, 14]),
        ([1.0, 0.0], 8, (1, 12), [4, 12]),
        ([0.5, 0.5, 0.9], 5, (1, 10), [7, 7, 1]),  # 6.82, 6.82, 1.36
    ],
)
def test_rank_table(energies: list[float], r: int, limits: tuple[int, int], expected: list[int]) -> None:
    assert energy_ranks(energies, r, [limits] * len(energies)) == expected


def test_limits_must_enclose_r() -> None:
    with pytest.raises(ValueError, match=r"enclose r = 4, got \(5, 9\)"):
        energy_ranks([0.5], 4, [(5, 9)])


def test_energy_config_fills_the_pattern_and_keeps_the_total() -> None:
    model = block()
    with torch.no_grad():
        model.up.weight.copy_(decaying(0.5).t())  # nearly all of it in the first singular values
    tuned = adapted(model, r=6, ranks="energy")
    pattern = tuned.peft_config["default"].rank_pattern
    assert list(pattern) == ["up", "down"] and sum(pattern.values()) == 12
    assert pattern["up"] < 6 < pattern["down"]
    assert [layer.r["default"] for layer in layers(tuned)] == list(pattern.values())


def test_another_rule() -> None:
    model = block()
    pattern = rank_pattern_for(model, config(r=4), lambda energies, r, limits: [r - 1, r + 1])
    assert pattern == {"up": 3, "down": 5}
    assert [layer.r["default"] for layer in layers(adapted(model, r=4, rank_pattern=pattern))] == [3, 5]
    with pytest.raises(ValueError, match="expected 2 ranks that add up to 8 from the rule, got"):
        rank_pattern_for(block(), config(r=4), lambda energies, r, limits: [r, r + 1])
    with pytest.raises(ValueError, match=r"expected a rank in \[1, 8\] for up, got 0"):
        rank_pattern_for(block(), config(r=4), lambda energies, r, limits: [0, 8])
    with pytest.raises(UnsupportedModelError, match="class is Embedding"):
        rank_pattern_for(torch.nn.Sequential(torch.nn.Embedding(3, 3)), config(target_modules=["0"]))
