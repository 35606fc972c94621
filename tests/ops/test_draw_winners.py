"""The estimators with replacement: their winners, their probabilities, and that both are unbiased."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memsave import ops
from memsave.ops.draw_winners.reference import _random_below
from memsave.ops.philox import REPLACEMENT_STREAM, row_words
from memsave.ops.row_inclusion.reference import integer_weights
from tests.cases.ops.inputs import log_normal, seed


def test_winners_minimize_the_rest_over_the_draws_left() -> None:
    weights, k = log_normal(60, sigma=1.5), 20
    p = (integer_weights(weights).double() / integer_weights(weights).sum()).sort(descending=True).values
    objective = torch.stack([(1 - p[:c].sum()) / (k - c) for c in range(k)])
    best = int(objective.argmin())
    rows, scale = ops.draw_winners(weights, k, seed(1), True)
    assert best > 0
    assert rows[:best].tolist() == weights.argsort(descending=True)[:best].tolist()
    assert scale[:best].tolist() == [1.0] * best and float(scale[best:].min()) > 1.0
    assert not set(rows[best:].tolist()) & set(rows[:best].tolist())


def test_equal_weights_have_no_winners() -> None:
    _, scale = ops.draw_winners(torch.ones(30), 10, seed(3), True)
    assert scale.tolist() == [3.0] * 10


def test_scale_is_one_over_k_p() -> None:
    weights = torch.tensor([1.0, 2.0, 5.0])
    rows, scale = ops.draw_winners(weights, 2, seed(3), False)
    expected = 8.0 / (2 * weights[rows])
    assert torch.allclose(scale, expected, rtol=1e-6)


@pytest.mark.parametrize("limit", [1, 7, 2**31 - 1, 2**45 + 12345, 2**61])
def test_random_integers_below_a_limit_equal_those_of_python(limit: int) -> None:
    low, high, _, _ = row_words(torch.arange(50), REPLACEMENT_STREAM, seed(6))
    random = [(h % 2**31) << 31 | (w % 2**31) for w, h in zip(low.tolist(), high.tolist(), strict=True)]
    assert _random_below(torch.tensor(limit), 50, seed(6)).tolist() == [r * limit >> 62 for r in random]


@pytest.mark.parametrize("winners", [False, True])
def test_mean_of_the_estimates_is_the_sum(winners: bool) -> None:
    n, k, draws = 20, 8, 1500
    weights, values = log_normal(n, value=4), log_normal(n, value=5).double()
    estimates = torch.empty(draws, dtype=torch.float64)
    counts = torch.zeros(n, dtype=torch.float64)
    for value in range(draws):
        rows, scale = ops.draw_winners(weights, k, seed(value), winners)
        estimates[value] = (scale.double() * values[rows]).sum()
        counts.index_add_(0, rows.long(), scale.double())
    error = estimates.std() / draws**0.5
    assert float((estimates.mean() - values.sum()).abs()) <= 4 * float(error)
    # Every single row counts once on average; its variance is at most that of k draws of the rarest row.
    rarest = float(weights.sum() / weights.min()) / k
    assert float((counts / draws - 1).abs().max()) <= 5 * (rarest / draws) ** 0.5


@pytest.mark.parametrize(
    ("weights", "k", "seed_", "message"),
    [
        (torch.ones(5), 5, seed(0), "got 5"),
        (torch.ones(5, dtype=torch.int32), 2, seed(0), "weights must be"),
        (torch.ones(5), 2, torch.tensor(1.0), "seed must be"),
        (torch.ones(5, device="meta"), 2, seed(0), "one device"),
    ],
)
def test_bad_input_is_refused(weights: Tensor, k: int, seed_: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.draw_winners(weights, k, seed_, True)
