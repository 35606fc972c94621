"""Statistics of the sampled weight gradient: it is unbiased, and its variance is the one that theory gives.

x (N, D), dy (N, O), G = dy^T x (O, D); k of N rows are kept. Row i contributes Y_i = dy_i x_i^T to G. The rows are
drawn by the norms of x alone, so the closed forms below are those for any probabilities p_i, not only the optimal ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from memsave import ops
from memsave.nn.rows import KeepRows

from .linears import ESTIMATORS, LAYERS, convert, last_weight_grad, step_data

MODULE_DRAWS = 1000
OP_DRAWS = 1500
ROWS, FEATURES, OUTPUTS = 256, 16, 16
KEEP_RATIO = 0.3


def deviations(draws: Tensor, exact: Tensor) -> dict[str, float]:
    """How far the mean of the draws (R, O, D) is from the exact gradient, in units in which 4 is too far.

    entries: the largest number of standard errors of an entry; projection: those of a random projection; distance: of
    the squared distance between mean and exact gradient, whose expectation is the trace of the covariance over R.
    """
    draws, exact = draws.double().flatten(1), exact.double().flatten()
    count = draws.shape[0]
    error = draws.mean(0) - exact
    standard_error = draws.std(0) / count**0.5
    direction = torch.randn(exact.numel(), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    projected = draws @ direction
    covariance = torch.cov(draws.t())
    expected = covariance.trace() / count
    spread = (2 * covariance.square().sum()).sqrt() / count  # of a sum of squared Gaussians
    return {
        "entries": float((error.abs() / standard_error).max()),
        "projection": float((projected.mean() - exact @ direction).abs() / (projected.std() / count**0.5)),
        "distance": float((error.square().sum() - expected) / spread),
    }


def draws_of(model: nn.Sequential) -> Tensor:
    """dW of many training steps of one model on the same data."""
    x, dy = step_data()
    torch.manual_seed(0)
    return torch.stack([last_weight_grad(model, x, dy) for _ in range(MODULE_DRAWS)])  # (R, O, D)


@cache
def plain_and_draws(layer: str, estimator: str) -> tuple[Tensor, Tensor]:
    """The exact dW (O, D), and draws of it."""
    torch.manual_seed(0)
    plain = LAYERS[layer]()
    return last_weight_grad(plain, *step_data()), draws_of(convert(plain, estimator=estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_of_many_draws_is_the_exact_gradient(layer: str, estimator: str) -> None:
    exact, draws = plain_and_draws(layer, estimator)
    assert draws.std(0).min() > 0.01 * exact.std(), "nothing was sampled"
    found = deviations(draws, exact)
    assert max(found.values()) < 4, found


def test_the_first_step_is_unbiased() -> None:
    """The released code of the paper skips the scale until it has seen a sample twice."""
    torch.manual_seed(0)
    plain = LAYERS["Linear"]()
    x, dy = step_data()
    draws = torch.stack([last_weight_grad(convert(plain, estimator="wta_crs"), x, dy) for _ in range(MODULE_DRAWS)])
    found = deviations(draws, last_weight_grad(plain, x, dy))
    assert max(found.values()) < 4, found


class _NoScale(KeepRows):
    """Kept rows weigh N / k each, as if they had been drawn uniformly."""

    def draw(self, x: Tensor, seed: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, scale = super().draw(x, seed, factors)
        return rows, torch.full_like(scale, x.shape[0] / len(scale))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_the_test_a_missing_scale_is_caught(estimator: str) -> None:
    model: Any = convert(LAYERS["Linear"](), estimator=estimator)
    x, dy = step_data()
    model[-1]._memsave_parts["keep"] = _NoScale(KEEP_RATIO, 1, estimator)
    found = deviations(draws_of(model), dy.t() @ x)
    assert found["entries"] > 4 and found["distance"] > 4, found


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_the_test_a_bias_of_five_percent_is_caught(estimator: str) -> None:
    """In whatever direction it points: random ones, the gradient's own, one entry's."""
    exact, draws = plain_and_draws("Linear", estimator)
    single = torch.zeros_like(exact)
    single[2, 3] = 1.0
    random = torch.randn(20, *exact.shape, generator=torch.Generator().manual_seed(0))
    for direction in (exact, single, *random):
        biased = draws + 0.05 * exact.norm() * direction / direction.norm()
        assert max(deviations(biased, exact).values()) > 4


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_gradient_is_the_weighted_sum_over_the_drawn_rows(layer: str, estimator: str) -> None:
    torch.manual_seed(0)
    plain = LAYERS[layer]().double()
    model, (x, dy) = convert(plain, estimator=estimator), step_data(dtype=torch.float64)
    torch.manual_seed(5)
    found = last_weight_grad(model, x, dy)
    torch.manual_seed(5)
    inputs = plain[:-1](x).detach()  # of the linear
    rows, scale = KeepRows(KEEP_RATIO, 1, estimator).draw(inputs, ops.new_seed(inputs))
    expected = torch.einsum("r,ro,rd->od", scale.double(), dy[rows.long()], inputs[rows.long()])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def rows_and_gradients(norms: str, upstream: str) -> tuple[Tensor, Tensor]:
    """x (N, D) with log-normal or equal row norms; dy (N, O) with equal or Gaussian ones, in fp64."""
    generator = torch.Generator().manual_seed(1)
    x = nn.functional.normalize(torch.randn(ROWS, FEATURES, generator=generator), dim=1)
    if norms == "log-normal":
        x = x * torch.randn(ROWS, 1, generator=generator).exp()
    dy = torch.randn(ROWS, OUTPUTS, generator=generator) + 0.5 * x @ torch.randn(FEATURES, OUTPUTS, generator=generator)
    return x.double(), (nn.functional.normalize(dy, dim=1) if upstream == "equal" else dy).double()


def products(x: Tensor, dy: Tensor) -> Tensor:
    """(N, N): the inner product of Y_i and Y_j; its diagonal is |dy_i|^2 |x_i|^2 and its sum |G|^2."""
    return (x @ x.t()) * (dy @ dy.t())


@cache
def empirical_variance(norms: str, upstream: str, estimator: str) -> float:
    """The mean of |dW - G|^2 over many draws: the trace of the covariance, since the mean is G."""
    x, dy = rows_and_gradients(norms, upstream)
    keep = KeepRows(KEEP_RATIO, 1, estimator)
    errors = torch.full((OP_DRAWS, ROWS), -1.0, dtype=torch.float64)  # dW - G = sum over i of errors_i Y_i
    for draw in range(OP_DRAWS):
        rows, scale = keep.draw(x.float(), torch.tensor(draw))
        errors[draw].index_add_(0, rows.long(), scale.double())
    return float(torch.einsum("ri,ij,rj->r", errors, products(x, dy), errors).mean())


def crs_variance(x: Tensor, dy: Tensor, k: int) -> Tensor:
    """(sum of |Y_i|^2 / p_i - |G|^2) / k: k independent draws. It is (W^2 - |G|^2) / k where p_i is optimal."""
    p = x.norm(dim=1) / x.norm(dim=1).sum()
    y = products(x, dy)
    return ((y.diagonal() / p).sum() - y.sum()) / k


def wta_crs_variance(x: Tensor, dy: Tensor, k: int) -> Tensor:
    """CRS with k - c draws on the rows that are no winners, whose p_i add up to 1 - P: winners have no variance."""
    p, order = (x.norm(dim=1) / x.norm(dim=1).sum()).sort(descending=True)
    rest = 1 - p.cumsum(0) + p  # of the rows from c on
    winners = int((rest[:k] / torch.arange(k, 0, -1)).argmin())
    losers = order[winners:]
    y = products(x, dy)[losers][:, losers]
    return (rest[winners] * (y.diagonal() / p[winners:]).sum() - y.sum()) / (k - winners)


def pps_variance(x: Tensor, dy: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Hajek's approximation: sum of b_i |Y_i / pi_i - A|^2, where A is the mean of Y_i / pi_i with weights b_i.

    b_i = pi_i (1 - pi_i) m / (m - 1) for the m rows with pi_i < 1: the form that is exact for equal probabilities.
    Hajek, "Asymptotic theory of rejective sampling with varying probabilities from a finite population", 1964. Without
    A and the factor it is the variance of independent (Poisson) draws; A is what the fixed size saves. `weights` (N,)
    are those that rows are drawn by, the norms of x by default.
    """
    pi = ops.row_inclusion(x.norm(dim=1) if weights is None else weights, k).double() / 2**32
    m = (pi < 1).sum()
    b = pi * (1 - pi) * m / (m - 1)
    y = products(x, dy)
    return (b / pi**2 * y.diagonal()).sum() - (b / pi) @ y @ (b / pi) / b.sum()


CLOSED_FORMS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "crs": crs_variance,
    "wta_crs": wta_crs_variance,
    "pps": pps_variance,
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("upstream", ["equal", "gaussian"])
@pytest.mark.parametrize("norms", ["log-normal", "equal"])
def test_the_variance_is_the_closed_form(norms: str, upstream: str, estimator: str) -> None:
    x, dy = rows_and_gradients(norms, upstream)
    expected = CLOSED_FORMS[estimator](x, dy, int(KEEP_RATIO * ROWS))
    assert empirical_variance(norms, upstream, estimator) == pytest.approx(float(expected), rel=0.05)


def test_with_optimal_probabilities_the_closed_forms_are_the_papers() -> None:
    x, dy = rows_and_gradients("log-normal", "equal")
    k = int(KEEP_RATIO * ROWS)
    weights, order = (x.norm(dim=1) * dy.norm(dim=1)).sort(descending=True)
    torch.testing.assert_close(crs_variance(x, dy, k), (weights.sum() ** 2 - (dy.t() @ x).norm() ** 2) / k)
    rest = weights.flip(0).cumsum(0).flip(0)[:k]  # W (1 - P_c) for each c
    c = int((rest / torch.arange(k, 0, -1)).argmin())
    losers = order[c:]
    expected = (rest[c] ** 2 - (dy[losers].t() @ x[losers]).norm() ** 2) / (k - c)
    assert c > 0
    torch.testing.assert_close(wta_crs_variance(x, dy, k), expected)


def test_variance_falls_from_crs_to_wta_crs_to_pps_on_log_normal_norms() -> None:
    found = {estimator: empirical_variance("log-normal", "equal", estimator) for estimator in ESTIMATORS}
    assert found["pps"] < 0.7 * found["wta_crs"] < 0.7 * 0.75 * found["crs"], found


def test_on_equal_norms_pps_gains_the_factor_of_drawing_without_replacement() -> None:
    pps, wta_crs, crs = (empirical_variance("equal", "equal", estimator) for estimator in ESTIMATORS)
    assert pps < 0.75 * crs
    assert wta_crs == pytest.approx(crs, rel=0.05)  # no winners


def test_pps_keeps_more_different_rows_than_the_others() -> None:
    x, _ = rows_and_gradients("log-normal", "equal")
    different = {e: len(KeepRows(KEEP_RATIO, 1, e).draw(x, torch.tensor(0))[0].unique()) for e in ESTIMATORS}
    assert different["pps"] == int(KEEP_RATIO * ROWS) > different["wta_crs"] > different["crs"]


def test_a_conv1d_has_the_gradient_of_its_linear() -> None:
    """The same draw gives the same numbers, so what is proved for one holds for the other."""
    x, dy = step_data()
    linear, conv = LAYERS["Linear"](), LAYERS["Conv1D"]()
    assert isinstance(conv[-1], Conv1D)
    found = []
    for model in (convert(linear), convert(conv)):
        torch.manual_seed(3)
        found.append(last_weight_grad(model, x, dy))
    torch.testing.assert_close(*found)
