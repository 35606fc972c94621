"""What `draw_rows` promises: k different rows, ascending, each with exactly its probability."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave import ops
from memsave.ops.draw_rows.reference import permutation_keys
from memsave.ops.philox import OFFSET_STREAM, row_words
from tests.cases.ops.inputs import inclusion, log_normal, seed
from tests.harness import assert_same

ONE = 2**32


def both(q: Tensor, k: int, seed_: Tensor) -> Tensor:
    """The result of the active backend, after a comparison with plain PyTorch."""
    rows = ops.draw_rows(q, k, seed_)
    with ops.use_reference():
        assert_same(rows, ops.draw_rows(q, k, seed_))
    return rows


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.floats(0, 5), st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=200)
def test_k_different_rows_in_order_with_the_certain_ones(n: int, ratio: float, sigma: float, value: int) -> None:
    k = min(max(1, int(ratio * n)), n - 1)
    q = inclusion(n, k, sigma)
    rows = both(q, k, seed(value))
    assert rows.dtype == torch.int32 and rows.shape == (k,)
    assert bool((rows.diff() > 0).all()) and int(rows[0]) >= 0 and int(rows[-1]) < n
    assert set((q == ONE).nonzero().flatten().tolist()) <= set(rows.tolist())


def offset(seed_: Tensor) -> int:
    return int(row_words(torch.tensor(0), OFFSET_STREAM, seed_)[0])


def test_a_mark_on_the_border_of_two_rows_hits_the_second() -> None:
    """Only then a row of length q holds exactly q of the 2^32 offsets."""
    seed_ = seed(4)
    first, second, third = permutation_keys(3, seed_).argsort().tolist()
    q = torch.zeros(3, dtype=torch.int64)
    q[first], q[second] = offset(seed_), ONE - offset(seed_)
    assert both(q, 1, seed_).tolist() == [second]
    q[first], q[second], q[third] = offset(seed_) + 1, ONE - offset(seed_) - 1, 0
    assert both(q, 1, seed_).tolist() == [first]


def test_rows_by_hand() -> None:
    """The marks at offset + j on the line of the permuted rows, in Python integers."""
    n, k, seed_ = 12, 5, seed(77)
    q = inclusion(n, k)
    order = sorted(range(n), key=permutation_keys(n, seed_).tolist().__getitem__)
    mark = offset(seed_)
    expected, end = [], 0
    for row in order:
        end += int(q[row])
        if end > mark:
            expected.append(row)
            mark += ONE
    assert both(q, k, seed_).tolist() == sorted(expected)


@pytest.mark.parametrize("sigma", [0.3, 2.0])
def test_each_row_is_drawn_as_often_as_its_probability_says(sigma: float) -> None:
    n, k, draws = 24, 7, 4000
    q = ops.row_inclusion(log_normal(n, sigma, value=5), k)
    counts = torch.zeros(n, dtype=torch.int64)
    for value in range(draws):
        counts[ops.draw_rows(q, k, seed(value))] += 1
    p = q.double() / ONE
    standard_error = (p * (1 - p) / draws).sqrt()
    assert bool(((counts / draws - p).abs() <= 5 * standard_error).all())
    assert bool((counts[q == ONE] == draws).all())


def test_pairs_of_rows_are_drawn_as_by_a_random_permutation() -> None:
    """With equal probabilities every pair is equally likely; a fixed order would never give neighbours."""
    n, k, draws = 8, 3, 6000
    q = ops.row_inclusion(torch.ones(n), k)
    together = torch.zeros(n, n, dtype=torch.int64)
    for value in range(draws):
        rows = ops.draw_rows(q, k, seed(value)).long()
        together[rows[:, None], rows[None, :]] += 1
    p = k * (k - 1) / (n * (n - 1))
    pairs = together[torch.triu(torch.ones(n, n, dtype=torch.bool), diagonal=1)] / draws
    assert float((pairs - p).abs().max()) <= 5 * math.sqrt(p * (1 - p) / draws)


def test_the_seed_decides_all_63_bits_of_it() -> None:
    q = inclusion(64, 20)
    drawn = {tuple(both(q, 20, seed(value)).tolist()) for value in (0, 1, 2**31, 2**32, 2**62)}
    assert len(drawn) == 5
    assert_same(both(q, 20, seed(2**62)), both(q, 20, seed(2**62)))


def test_many_rows_share_buckets_of_the_sort() -> None:
    q = inclusion(5000, 2500)
    assert both(q, 2500, seed(1)).shape == (2500,)


def test_too_small_a_sum_is_refused() -> None:
    q = inclusion(10, 2)
    with pytest.raises(IndexError):
        ops.draw_rows(q, 9, seed(0))
    with ops.use_reference(), pytest.raises(IndexError):
        ops.draw_rows(q, 9, seed(0))


@pytest.mark.parametrize(
    ("q", "k", "seed_", "message"),
    [
        (torch.ones(5, dtype=torch.int64), 5, seed(0), "got 5"),
        (torch.ones(5, dtype=torch.int64), 0, seed(0), "got 0"),
        (torch.ones(5), 2, seed(0), "q must be a 1-D torch.int64"),
        (torch.ones(5, 1, dtype=torch.int64), 2, seed(0), "q must be a 1-D"),
        (torch.ones(5, dtype=torch.int64), 2, torch.tensor(0.0), "seed must be a 0-D torch.int64"),
        (torch.ones(5, dtype=torch.int64), 2, torch.zeros(1, dtype=torch.int64), "seed must be a 0-D"),
        (torch.ones(5, dtype=torch.int64), 2, seed(0).to("meta"), "one device"),
    ],
)
def test_bad_input_is_refused(q: Tensor, k: int, seed_: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.draw_rows(q, k, seed_)
