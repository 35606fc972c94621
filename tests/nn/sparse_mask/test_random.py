"""Random masks: the same bits for ever, uniform, and exact in number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import memsave
from memsave.nn.sparse_mask import random, random_indices
from memsave.ops import philox

from .masks import assert_valid

# (numel, k, seed, mask). Files hold only seeds: if one of these changes, every file with a random mask is broken.
KNOWN_ANSWERS = [
    (10, 3, 0, [0, 2, 6]),
    (1000, 5, 1099511627785, [17, 238, 246, 830, 992]),
    (10, 8, 0, [0, 1, 3, 4, 5, 7, 8, 9]),
    (58720256, 4, 4611686018427387905, [7564269, 14142954, 14684047, 48900580]),
    (2147483647, 3, 7, [30664320, 1460916062, 1555964680]),
    (5, 5, 0, [0, 1, 2, 3, 4]),
]


@pytest.mark.parametrize(("numel", "k", "seed", "mask"), KNOWN_ANSWERS)
def test_known_answers(numel: int, k: int, seed: int, mask: list[int]) -> None:
    assert random_indices(numel, k, seed).tolist() == mask


def test_known_answer_of_many() -> None:
    mask = random_indices(2**31 - 1, 50_000, 123)
    assert int(mask.long().sum()) == 53825238958229
    assert int((mask.long() * torch.arange(50_000)).sum() % (2**31 - 1)) == 392994555


def by_the_word(numel: int, k: int, seed: int) -> list[int]:
    """The definition, one value at a time."""
    wanted, found, row = min(k, numel - k) if 2 * k > numel else k, set(), 0
    while len(found) < wanted:
        words = [int(w) for w in philox.row_words(torch.tensor(row), philox.MASK_STREAM, torch.tensor(seed))]
        for low, high in (words[:2], words[2:]):
            if len(found) < wanted:
                found.add((high % 2**30 * 2**32 + low) % numel)
        row += 1
    return sorted(set(range(numel)) - found) if 2 * k > numel else sorted(found)


@given(st.integers(1, 120), st.integers(0, 120), st.integers(0, 2**63 - 1))
@example(numel=9, k=9, seed=1)
@example(numel=1, k=1, seed=2)
@example(numel=0, k=0, seed=2)
def test_equals_the_definition(numel: int, k: int, seed: int) -> None:
    k = min(k, numel)
    assert random_indices(numel, k, seed).tolist() == by_the_word(numel, k, seed)


@given(st.integers(1, 2**31 - 1), st.integers(0, 3000), st.integers(0, 2**63 - 1))
def test_count_order_and_range(numel: int, k: int, seed: int) -> None:
    k = min(k, numel)
    assert_valid(random_indices(numel, k, seed), k, numel)


@pytest.mark.parametrize("k", [30_000, 65_536, 99_999])
def test_more_rows_than_one_piece(k: int) -> None:
    mask = random_indices(131_072, k, 5)
    assert_valid(mask, k, 131_072)
    assert torch.equal(mask, random_indices(131_072, k, 5))


def test_the_pieces_do_not_change_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_indices(10_000, 2_000, 8)
    monkeypatch.setattr(random, "_ROWS_AT_ONCE", 7)
    assert torch.equal(random_indices(10_000, 2_000, 8), mask)


def test_too_few_draws_are_extended(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = random_indices(1_000, 500, 8)
    monkeypatch.setattr(math, "log1p", lambda x: x)  # as if no value were ever drawn twice
    monkeypatch.setattr(math, "sqrt", lambda x: 0.0)
    assert torch.equal(random_indices(1_000, 500, 8), mask)


@pytest.mark.parametrize("k", [3, 17])  # drawn, and the complement of what is drawn
def test_every_position_is_equally_likely(k: int) -> None:
    """chi^2 of the counts over 4,000 seeds, from the same seeds each time; 44 is its 99.9% quantile (19 degrees)."""
    numel, trials = 20, 4_000
    counts = sum(torch.bincount(random_indices(numel, k, seed), minlength=numel) for seed in range(trials))
    expected = trials * k / numel
    # Without replacement a count has the variance trials * p * (1 - p) * numel / (numel - 1) of independent ones.
    chi2 = float(((counts - expected) ** 2).sum() / expected / (1 - k / numel) * (numel - 1) / numel)
    assert 5 < chi2 < 44


def test_every_pair_is_equally_likely() -> None:
    trials = 6_000
    masks = torch.stack([random_indices(6, 2, seed) for seed in range(trials)]).long()
    counts = torch.bincount(masks[:, 0] * 6 + masks[:, 1], minlength=36)
    pairs = counts[counts > 0]
    assert pairs.numel() == 15
    expected = trials / 15
    assert 2 < float(((pairs - expected) ** 2).sum() / expected) < 36.2  # 14 degrees, 99.9%


def test_the_whole_range_is_used() -> None:
    mask = random_indices(2**31 - 1, 4_000, 3).double()
    counts = torch.histc(mask, 20, 0, 2**31)
    assert float(((counts - 200) ** 2).sum() / 200) < 44


def test_nothing_else_decides() -> None:
    for k in (100, 900):
        mask = random_indices(1_000, k, 4)
        torch.manual_seed(1)
        state = torch.get_rng_state()
        with torch.device("meta"):
            assert torch.equal(random_indices(1_000, k, 4), mask)
        with torch.inference_mode():
            assert torch.equal(random_indices(1_000, k, 4), mask)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(random_indices(1_000, k, 5), mask)


def test_every_bit_of_the_seed_counts() -> None:
    masks = {tuple(random_indices(10**6, 4, 1 << bit).tolist()) for bit in range(63)}
    assert len(masks) == 63


def test_memory_is_proportional_to_the_mask() -> None:
    k = 200_000
    profile = memsave.measure(lambda: random_indices(2**31 - 1, k, 3))
    assert profile.peak_bytes < 60 * k + 2**24


def test_the_stream_is_its_own() -> None:
    streams = [value for name, value in vars(philox).items() if name.endswith("_STREAM")]
    assert len(streams) >= 4 and len(set(streams)) == len(streams)
    assert philox.MASK_STREAM == 3


@pytest.mark.parametrize(
    ("numel", "k", "seed", "match"),
    [
        (2**31, 1, 0, "0 to 2,147,483,647 entries"),
        (-1, 0, 0, "0 to 2,147,483,647 entries"),
        (10, 11, 0, "0 to 10 entries.*got 11"),
        (10, -1, 0, "0 to 10 entries.*got -1"),
        (10, 1, -1, "seed.*got -1"),
        (10, 1, 2**63, "seed"),
    ],
)
def test_bad_arguments(numel: int, k: int, seed: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        random_indices(numel, k, seed)
