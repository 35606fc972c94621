"""What `row_inclusion` promises for any weights, and its values where they can be computed by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave import ops
from memsave.ops.row_inclusion.reference import cap, integer_weights
from tests.cases.ops.inputs import log_normal
from tests.harness import assert_same

ONE = 2**32

special = [0.0, 1.0, 2.0**-100, float("inf"), float("nan")]
values = st.floats(min_value=0, max_value=2.0**126, width=32) | st.sampled_from(special)
weights_and_k = st.lists(values, min_size=2, max_size=40).flatmap(
    lambda w: st.tuples(st.just(torch.tensor(w, dtype=torch.float32)), st.integers(1, len(w) - 1))
)


def both(weights: Tensor, k: int) -> Tensor:
    """The result of the active backend, after a comparison with plain PyTorch."""
    q = ops.row_inclusion(weights, k)
    with ops.use_reference():
        assert_same(q, ops.row_inclusion(weights, k))
    return q


@given(weights_and_k)
@settings(deadline=None, max_examples=200)
def test_sum_bounds_and_order(case: tuple[Tensor, int]) -> None:
    weights, k = case
    q = both(weights, k)
    assert sum(q.tolist()) == k * ONE
    assert 1 <= int(q.min()) and int(q.max()) <= ONE

    m = integer_weights(weights)
    slack = len(q) + k  # the remainder, which the first rows get
    ordered = q[m.argsort(stable=True)]
    assert bool((ordered[1:] >= ordered[:-1] - slack).all())


@given(weights_and_k)
@settings(deadline=None, max_examples=200)
def test_probabilities_are_the_exact_ones_up_to_rounding(case: tuple[Tensor, int]) -> None:
    weights, k = case
    q, m = both(weights, k), integer_weights(weights).tolist()
    capped, expected = set[int](), [Fraction(0)] * len(m)
    while True:  # cap whatever exceeds 1 until nothing does, in exact fractions
        rest = sum(m[i] for i in range(len(m)) if i not in capped)
        expected = [Fraction(1) if i in capped else Fraction((k - len(capped)) * m[i], rest) for i in range(len(m))]
        over = {i for i, p in enumerate(expected) if p >= 1 and i not in capped}
        if not over:
            break
        capped |= over
    # A row gets at least one step, loses at most one to rounding, and may get the whole remainder.
    slack = 2 * len(m) + k
    assert max(abs(a - b * ONE) for a, b in zip(q.tolist(), expected, strict=True)) <= slack
    assert {i for i, value in enumerate(q.tolist()) if value == ONE} >= capped


@given(weights_and_k)
@settings(deadline=None, max_examples=200)
def test_capping_by_value_caps_as_many_rows_as_counted(case: tuple[Tensor, int]) -> None:
    weights, k = case
    m = integer_weights(weights)
    c, rest = cap(m.sort(descending=True).values, k)
    assert int(((k - c) * m >= rest).sum()) == int(c) < k
    assert int(rest) == int(m.sort().values[: len(m) - int(c)].sum())


def test_equal_weights_share_equally() -> None:
    q = both(torch.ones(8), 2)
    assert len(set(q[1:].tolist())) == 1 and abs(int(q[1]) - ONE // 4) <= 1  # the first one has the remainder


def test_proportional_to_the_weights_below_the_cap() -> None:
    q = both(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2).double() / ONE
    assert torch.allclose(q, torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), rtol=1e-8)


def test_a_row_with_more_than_its_share_is_capped_and_the_others_split_the_rest() -> None:
    q = both(torch.tensor([1.0, 100.0, 1.0, 2.0]), 2)
    assert int(q[1]) == ONE
    assert torch.allclose(q[[0, 2, 3]].double() / ONE, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64), rtol=1e-7)


def test_zeros_negative_and_not_finite_weights() -> None:
    assert_same(both(torch.zeros(4), 1), both(torch.ones(4), 1))
    nan, inf = float("nan"), float("inf")
    q = both(torch.tensor([nan, 1.0, -5.0, inf, 0.0]), 2)
    assert q[1] == q[2] == q[4] and int(q[0]) > 0.99 * ONE and int(q[3]) > 0.99 * ONE


def test_integer_weights_by_hand() -> None:
    steps = 2**30
    assert integer_weights(torch.tensor([0.0, 0.25, 1.0, -1.0])).tolist() == [1, 1 + steps // 4, 1 + steps, 1]
    assert integer_weights(torch.zeros(2)).tolist() == [1, 1]


def test_many_rows_of_the_largest_weight() -> None:
    q = both(torch.ones(100_003), 50_001)
    assert sum(q.tolist()) == 50_001 * ONE


def test_result_does_not_depend_on_the_dtype_that_holds_the_weights() -> None:
    weights = log_normal(50).bfloat16()
    assert_same(both(weights.double(), 20), both(weights, 20))


@pytest.mark.parametrize(
    ("weights", "k", "message"),
    [
        (torch.ones(5), 5, r"\[1, N - 1\] for N = 5 rows; got 5"),
        (torch.ones(5), 6, "got 6"),
        (torch.ones(5), 0, "got 0"),
        (torch.ones(0), 1, "N = 0 rows"),
        (torch.ones(5, 2), 1, r"1-D .* shape \(5, 2\)"),
        (torch.ones(5, dtype=torch.int64), 1, "torch.int64"),
        (torch.ones(5, dtype=torch.complex64), 1, "torch.complex64"),
        (torch.ones(2**31, device="meta"), 1, "2147483648"),
    ],
)
def test_bad_input_is_refused(weights: Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.row_inclusion(weights, k)
