"""Ranks by a ratio, by energy, and for many weights under one budget: against brute force and uniform ranks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave.nn.low_rank.ranks import allocate, break_even_rank, rank_for_energy, rank_for_ratio

Shapes = dict[str, tuple[int, int]]


def spectra_of(shapes: Shapes, seed: int = 0, power: float = 3.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(min(shape), generator=generator, dtype=torch.float64).pow(power).sort(descending=True).values
        for name, shape in shapes.items()
    }


def cost(shape: tuple[int, int], rank: int | None) -> int:
    return shape[0] * shape[1] if rank is None else rank * sum(shape)


def total_cost(shapes: Shapes, ranks: dict[str, int | None]) -> int:
    return sum(cost(shapes[name], rank) for name, rank in ranks.items())


def retained(spectra: dict[str, Tensor], ranks: dict[str, int | None]) -> float:
    return sum(float(s[: ranks[name]].square().sum() / s.square().sum()) for name, s in spectra.items())


def drawn_shapes(count: int, largest: int) -> st.SearchStrategy[Shapes]:
    shape = st.tuples(st.integers(1, largest), st.integers(1, largest))
    return st.lists(shape, min_size=1, max_size=count).map(lambda shapes: {f"w{i}": s for i, s in enumerate(shapes)})


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (2, 2), (3, 6), (768, 768), (768, 3072), (5, 7)])
def test_break_even(shape: tuple[int, int]) -> None:
    rank = break_even_rank(*shape)
    assert cost(shape, rank) < cost(shape, None) <= cost(shape, rank + 1)


def test_rank_for_ratio() -> None:
    assert rank_for_ratio(768, 768, 0.5) == 192
    assert rank_for_ratio(768, 3072, 0.5) == 307
    assert rank_for_ratio(768, 768, 1.0) == 384
    assert rank_for_ratio(8, 8, 0.001) == 1
    assert rank_for_ratio(1, 1, 1.0) == 1
    for ratio in (0.1, 0.3, 0.77):
        rank = rank_for_ratio(40, 70, ratio)
        assert cost((40, 70), rank) <= ratio * 2800 < cost((40, 70), rank + 1)


def test_rank_for_energy() -> None:
    spectrum = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0])  # squares 9, 4, 1, 1, 1 of 16
    shares = {0.01: 1, 9 / 16: 1, 0.57: 2, 13 / 16: 2, 0.82: 3, 14 / 16: 3, 0.9: 4, 0.95: 5, 1.0: 5}
    assert {share: rank_for_energy(spectrum, share) for share in shares} == shares
    assert rank_for_energy(torch.tensor([2.0, 1.0, 0.0]), 1.0) == 2
    assert rank_for_energy(torch.zeros(4), 1.0) == 1
    assert rank_for_energy(torch.ones(3001).bfloat16(), 0.5) == 1501  # bfloat16 cannot count so far


@given(shapes=drawn_shapes(4, 24), ratio=st.floats(0.05, 1.0), seed=st.integers(0, 99))
@settings(max_examples=200)
def test_the_budget_is_kept_and_used(shapes: Shapes, ratio: float, seed: int) -> None:
    spectra = spectra_of(shapes, seed)
    budget = ratio * total_cost(shapes, dict.fromkeys(shapes))
    least = {name: 1 if break_even_rank(*shape) else None for name, shape in shapes.items()}
    if total_cost(shapes, least) > budget:
        with pytest.raises(ValueError, match="ratio: rank 1 everywhere takes"):
            allocate(spectra, shapes, ratio)
        return
    ranks = allocate(spectra, shapes, ratio)
    assert list(ranks) == list(shapes)
    assert total_cost(shapes, ranks) <= budget
    assert all(rank is None or 1 <= rank <= break_even_rank(*shapes[name]) for name, rank in ranks.items())
    open_ones = [sum(shapes[name]) for name, rank in ranks.items() if rank is not None]
    assert not open_ones or budget - total_cost(shapes, ranks) < max(open_ones)


@given(shapes=drawn_shapes(4, 24), ratios=st.tuples(*[st.floats(0.3, 1.0)] * 2), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_no_rank_falls_when_the_ratio_rises(shapes: Shapes, ratios: tuple[float, float], seed: int) -> None:
    spectra = spectra_of(shapes, seed)
    try:
        few, many = (allocate(spectra, shapes, ratio) for ratio in sorted(ratios))
    except ValueError:
        return
    assert all(many[name] is None or (few[name] or 10**9) <= many[name] for name in shapes)


def test_a_ratio_of_one_leaves_all_dense() -> None:
    shapes = {"a": (8, 8), "b": (1, 5), "c": (20, 6)}
    assert allocate(spectra_of(shapes), shapes, 1.0) == {"a": None, "b": None, "c": None}
    assert allocate({}, {}, 0.5) == {}


@given(shapes=drawn_shapes(3, 9), ratio=st.floats(0.3, 0.99), seed=st.integers(0, 99))
@settings(max_examples=100)
def test_brute_force_finds_nothing_better(shapes: Shapes, ratio: float, seed: int) -> None:
    """Among all ranks up to the break-even that take as much as was taken."""
    spectra = spectra_of(shapes, seed)
    try:
        ranks = allocate(spectra, shapes, ratio)
    except ValueError:
        return
    if None in ranks.values():
        return
    spent = total_cost(shapes, ranks)
    every = product(*(range(1, break_even_rank(*shape) + 1) for shape in shapes.values()))
    others: list[dict[str, int | None]] = [dict(zip(shapes, choice, strict=True)) for choice in every]
    best = max(retained(spectra, other) for other in others if total_cost(shapes, other) <= spent)
    assert retained(spectra, ranks) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("ratio", [0.15, 0.4, 0.7, 0.95])
@pytest.mark.parametrize("seed", range(5))
def test_more_energy_than_uniform_ranks(ratio: float, seed: int) -> None:
    shapes = {f"w{i}": (24, 40) for i in range(6)}
    spectra = {
        name: spectrum
        for i, name in enumerate(shapes)
        for spectrum in spectra_of({name: shapes[name]}, seed + i, power=1 + i).values()
    }
    ranks = allocate(spectra, shapes, ratio)
    uniform: dict[str, int | None] = {name: rank_for_ratio(*shape, ratio) for name, shape in shapes.items()}
    assert retained(spectra, ranks) > retained(spectra, uniform) + 1e-3
    assert total_cost(shapes, ranks) <= ratio * total_cost(shapes, dict.fromkeys(shapes))


def test_by_share_of_the_own_weight_and_by_parameter() -> None:
    """The scale of a weight does not matter, and a component of a large weight must hold more to be worth it."""
    spectra = {"a": torch.tensor([2.0] + [1.0] * 11) * 100, "b": torch.tensor([2.0] + [1.0] * 11)}
    assert allocate(spectra, {"a": (12, 12), "b": (12, 12)}, 0.5) == {"a": 3, "b": 3}
    assert allocate(spectra, {"a": (12, 48), "b": (12, 12)}, 0.3) == {"a": 1, "b": None}
    # 60 + 24 for rank 1, then b up to its break-even rank of 5 for 4 * 24 and dense for 24 more: 204 of 216.
    assert allocate(spectra, {"a": (12, 48), "b": (12, 12)}, 0.28) == {"a": 1, "b": 5}


def test_what_is_beyond_the_break_even_rank_is_bought_as_a_whole() -> None:
    """All of the flat tail of "a" for 4 parameters is worth more than a component of "b" for 20; its end is not."""
    spectra = {"a": torch.tensor([5.0] * 4 + [1.0] * 4), "b": torch.tensor([4.0] + [1.2] * 9)}
    shapes = {"a": (8, 9), "b": (10, 10)}  # break-even at 4 (68 of 72) and 4; 92 of 172 parameters
    assert allocate(spectra, shapes, 0.54) == {"a": None, "b": 1}


def test_equal_components_go_in_turn_and_to_the_first_name() -> None:
    shapes = {"b": (10, 10), "a": (10, 10)}
    spectra = {"b": torch.ones(10), "a": torch.ones(10)}
    assert allocate(spectra, shapes, 0.5) == {"b": 3, "a": 2}
    assert allocate(dict(reversed(spectra.items())), shapes, 0.5) == {"a": 3, "b": 2}


def test_weights_of_zeros_get_what_no_other_wants() -> None:
    spectra = {"zeros": torch.zeros(10), "a": torch.ones(10)}
    shapes = {"zeros": (10, 10), "a": (10, 10)}
    assert allocate(spectra, shapes, 0.5) == {"zeros": 1, "a": 4}
    assert allocate(spectra, shapes, 0.7) == {"zeros": 2, "a": None}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, float("nan")])
def test_bad_shares(share: float) -> None:
    for call, what in (
        (lambda: rank_for_ratio(4, 4, share), "ratio"),
        (lambda: rank_for_energy(torch.ones(4), share), "energy"),
        (lambda: allocate({"a": torch.ones(4)}, {"a": (4, 4)}, share), "ratio"),
    ):
        with pytest.raises(ValueError, match=rf"{what}: expected a number in \(0, 1\], got {share}"):
            call()


@pytest.mark.parametrize(
    "spectrum",
    [torch.ones(2, 2), torch.ones(0), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, -1]), torch.arange(3.0)],
)
def test_bad_spectra(spectrum: Tensor) -> None:
    with pytest.raises(ValueError, match="spectrum: expected "):
        rank_for_energy(spectrum, 0.5)
    with pytest.raises(ValueError, match="spectra: a: expected "):
        allocate({"a": spectrum}, {"a": (2, 2)}, 0.9)


def test_other_bad_arguments() -> None:
    def fails(match: str, call: Any) -> None:
        with pytest.raises(ValueError, match=match):
            call()

    fails(r"got \(0, 4\)", lambda: break_even_rank(0, 4))
    fails(r"names differ from those of spectra: \['b'\]", lambda: allocate({}, {"b": (2, 2)}, 0.5))
    fails("a: expected 4 values for shape .*got 5", lambda: allocate({"a": torch.ones(5)}, {"a": (4, 5)}, 0.9))
    fails(
        "rank 1 everywhere takes 20 parameters, more than 0.1 of 100; expected a larger ratio",
        lambda: allocate({"a": torch.ones(10)}, {"a": (10, 10)}, 0.1),
    )
