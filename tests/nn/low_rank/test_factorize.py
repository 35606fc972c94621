"""Factors against the theorems that define them; W (O, D), N inputs, R the rank. e(A) = ||(W - A) C^(1/2)||_F."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import memsave
from memsave.nn.low_rank import factorize as module
from memsave.nn.low_rank.factorize import Factors, factorize, factorize_heads, spectrum

SHAPES = [(7, 7), (5, 12), (12, 5), (1, 6), (6, 1), (40, 33)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def moment_of(x: Tensor) -> Tensor:
    return x.mT @ x


def correlated(rows: int, features: int, seed: int = 1) -> Tensor:
    """Inputs (N, D) whose directions differ a thousandfold."""
    mixed = torch.linalg.qr(random(features, features, seed=seed))[0]
    return random(rows, features, seed=seed + 1) * torch.logspace(0, -3, features, dtype=torch.float64) @ mixed


def product(factors: Factors) -> Tensor:
    return (factors.second.double() @ factors.first.double()).flatten(0, -2)


def error(weight: Tensor, factors: Factors, moment: Tensor | None = None) -> float:
    rest = weight.double() - product(factors)
    return float(rest.norm() if moment is None else (rest @ moment.double() @ rest.mT).trace().clamp(min=0).sqrt())


def damped(moment: Tensor, damping: float = 1e-6) -> Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


@pytest.fixture(params=[module._BLOCK, 3], ids=["one block", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_the_tail_of_the_spectrum(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    sigma = torch.linalg.svdvals(weight)
    torch.testing.assert_close(spectrum(weight), sigma)
    for rank in range(1, min(shape) + 1):
        factors = factorize(weight, rank)
        assert [tuple(factor.shape) for factor in factors] == [(shape[0], rank), (rank, shape[1])]
        assert error(weight, factors) == pytest.approx(float(sigma[rank:].norm()), abs=1e-12)
    torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-13)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [3, 100])
def test_the_whitened_error_is_the_tail_of_the_whitened_spectrum(shape: tuple[int, int], rows: int) -> None:
    weight, moment = random(*shape), moment_of(correlated(rows, shape[1]))
    metric = damped(moment)
    sigma = torch.linalg.svdvals(weight @ torch.linalg.cholesky(metric))
    torch.testing.assert_close(spectrum(weight, moment=moment), sigma, rtol=1e-6, atol=1e-7 * float(sigma[0]))
    for rank in range(1, min(shape) + 1):
        factors = factorize(weight, rank, moment=moment)
        tail = float(sigma[rank:].norm())
        assert error(weight, factors, metric) == pytest.approx(tail, rel=1e-6, abs=1e-7 * float(sigma[0]))
    torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-12)


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rows=st.integers(1, 20),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=60)
def test_no_other_factors_are_better(shape: tuple[int, int], rows: int, seed: int, data: Any) -> None:
    """Eckart and Young, also against steps away from the factors found; in the plain and in the whitened metric."""
    weight, moment = random(*shape, seed=seed), moment_of(correlated(rows, shape[1], seed + 1))
    rank = data.draw(st.integers(1, min(shape)))
    for given_moment, metric in ((None, None), (moment, damped(moment))):
        best = factorize(weight, rank, moment=given_moment)
        least = error(weight, best, metric)
        for step in (10.0, 1.0, 1e-2, 1e-4):
            second = best.second + step * random(*best.second.shape, seed=seed + 7)
            first = torch.linalg.lstsq(second, weight).solution  # the best for this `second`, in every metric
            assert least <= error(weight, Factors(second, first), metric) + 1e-7 * float(weight.norm())
            first = best.first + step * random(*best.first.shape, seed=seed + 8)
            assert least <= error(weight, Factors(best.second, first), metric) + 1e-7 * float(weight.norm())


@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    rows=st.integers(1, 40),
    damping=st.sampled_from([0.0, 1e-9, 1e-6, 1e-2, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 999),
    data=st.data(),
)
@settings(max_examples=150)
def test_whitened_is_never_worse_on_the_inputs_themselves(
    out_features: int, in_features: int, rows: int, damping: float, dtype: torch.dtype, seed: int, data: Any
) -> None:
    weight = random(out_features, in_features, seed=seed).to(dtype)
    moment = moment_of(correlated(rows, in_features, seed + 1))
    rank = data.draw(st.integers(1, min(weight.shape)))
    whitened = error(weight, factorize(weight, rank, moment=moment, damping=damping), moment)
    plain = error(weight, factorize(weight, rank), moment)
    assert whitened <= plain * (1 + 1e-6) + 2e-6 * float(moment.trace().sqrt() * weight.double().norm())


@pytest.mark.parametrize("shape", [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize("rows", [12, 400])
def test_whitened_is_much_better_on_correlated_inputs(shape: tuple[int, int], rows: int) -> None:
    weight, moment = random(*shape), moment_of(correlated(rows, shape[1]))
    whitened, plain = (error(weight, factorize(weight, 8, moment=m), moment) for m in (moment, None))
    assert whitened < 0.4 * plain


def test_unseen_directions_are_kept_by_their_weight() -> None:
    """Inputs know one direction; the second component is then the best plain one of the rest."""
    weight = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double()
    moment = torch.diag(torch.tensor([1.0, 0, 0, 0]).double())
    expected = torch.diag(torch.tensor([1.0, 0, 0, 4.0]).double())
    torch.testing.assert_close(product(factorize(weight, 2, moment=moment)), expected)
    tall = torch.cat([weight, torch.zeros(2, 4).double()])
    torch.testing.assert_close(product(factorize(tall, 2, moment=moment))[:4], expected)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_inputs_of_very_different_sizes(shape: tuple[int, int]) -> None:
    """Scaling an input and its weights inversely changes nothing; without care the small weights were rounded away."""
    weight, moment = random(*shape), moment_of(random(50, shape[1], seed=1))
    scale = torch.logspace(-5, 5, shape[1], dtype=torch.float64)
    expected = product(factorize(weight, 3, moment=moment, damping=0.0))
    found = product(factorize(weight / scale, 3, moment=moment * scale[:, None] * scale, damping=0.0)) * scale
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_a_moment_of_zeros_or_a_multiple_of_one_is_plain(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    plain = factorize(weight, 3)
    for moment in (torch.zeros(shape[1], shape[1]), 7 * torch.eye(shape[1])):
        for mine, its in zip(factorize(weight, 3, moment=moment), plain, strict=True):
            torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("true_rank", [0, 2])
def test_weights_without_full_rank(shape: tuple[int, int], whitened: bool, true_rank: int) -> None:
    weight = random(shape[0], true_rank) @ random(true_rank, shape[1], seed=1)
    moment = moment_of(correlated(4, shape[1])) if whitened else None
    for rank in (max(1, true_rank), min(shape)):
        factors = factorize(weight, rank, moment=moment)
        assert all(bool(factor.isfinite().all()) for factor in factors)
        torch.testing.assert_close(product(factors), weight, rtol=0, atol=1e-9)
    assert bool((spectrum(weight, moment=moment)[true_rank:] < 1e-6).all())


@pytest.mark.parametrize("shape", [(48, 30), (30, 48)])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(shape: tuple[int, int], whitened: bool, dtype: torch.dtype) -> None:
    """Full rank gives the weight back to a few roundings of the result's dtype, also where it is stored transposed."""
    weight = random(*shape).to(dtype)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    moment = moment_of(correlated(60, shape[1])).to(result) if whitened else None
    factors = factorize(weight, 30, moment=moment)
    assert {factor.dtype for factor in factors} == {result}
    assert spectrum(weight, moment=moment).dtype == result
    rest = (weight.double() - product(factors)).norm() / weight.double().norm()
    assert rest < 12 * torch.finfo(result).eps
    stored = weight.t().contiguous().t()
    for mine, its in zip(factorize(stored, 30, moment=moment), factors, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
        assert mine.is_contiguous()


@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
@pytest.mark.parametrize("whitened", [False, True])
def test_the_sides_share_the_size_and_the_components_nest(shape: tuple[int, int], whitened: bool) -> None:
    weight = 1e6 * random(*shape)
    moment = moment_of(correlated(40, shape[1])) if whitened else None
    full = factorize(weight, 9, moment=moment)
    torch.testing.assert_close(full.second.norm(dim=0), full.first.norm(dim=1))
    if not whitened:
        torch.testing.assert_close(full.first.norm(dim=1), spectrum(weight).sqrt())
    assert float(torch.stack([factor.abs().max() for factor in full]).max()) < 1e4
    peak = full.first.gather(1, full.first.abs().argmax(1, keepdim=True))
    assert bool((peak > 0).all())
    for rank in (1, 4):
        part = factorize(weight, rank, moment=moment)
        torch.testing.assert_close(part.second, full.second[:, :rank])
        torch.testing.assert_close(part.first, full.first[:rank])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("heads", "size", "features"), [(3, 4, 10), (4, 10, 4), (2, 5, 5), (1, 4, 6)])
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_heads_are_blocks(heads: int, size: int, features: int, whitened: bool, rank: int) -> None:
    weight = random(heads * size, features)
    moment = moment_of(correlated(20, features)) if whitened else None
    found = factorize_heads(weight, rank, heads, moment=moment)
    assert found.second.shape == (heads, size, rank) and found.first.shape == (heads * rank, features)
    for head in range(heads):
        block = factorize(weight[head * size : (head + 1) * size], rank, moment=moment)
        torch.testing.assert_close(found.second[head], block.second)
        torch.testing.assert_close(found.first[head * rank : (head + 1) * rank], block.first)


def test_nothing_else_is_touched() -> None:
    weight = random(6, 9, dtype=torch.float32).requires_grad_()
    moment = moment_of(random(30, 9, dtype=torch.float32))
    before, state = (weight.detach().clone(), moment.clone()), torch.get_rng_state()
    found = [factorize(weight, 2, moment=moment) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(factorize(weight, 2, moment=moment))
    spectrum(weight, moment=moment)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, before[0]) and torch.equal(moment, before[1])
    for other in found[1:]:
        assert torch.equal(other.second, found[0].second) and torch.equal(other.first, found[0].first)
    assert not found[0].second.requires_grad and not found[0].first.requires_grad


@pytest.mark.parametrize("shape", [(256, 4096), (4096, 256)])
@pytest.mark.parametrize("whitened", [False, True])
def test_no_copy_of_the_weight_in_float64(shape: tuple[int, int], whitened: bool) -> None:
    weight = random(*shape, dtype=torch.float32)
    moment = torch.eye(shape[1]) if whitened else None
    given_bytes = weight.nbytes + (moment.nbytes if moment is not None else 0)
    peak_bytes = memsave.measure(lambda: factorize(weight, 16, moment=moment)).peak_bytes - given_bytes
    block_bytes = 8 * 1024 * 1024 if whitened and shape[1] > 1024 else 0  # of the moment
    assert peak_bytes < 1.5 * weight.nbytes + 2 * block_bytes


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_fake_and_meta_weights_give_zeros(shape: tuple[int, int]) -> None:
    expected = [(shape[0], 4), (4, shape[1])]
    meta = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    moment = torch.empty(shape[1], shape[1], device="meta")
    for factor, its in zip(factorize(meta, 4, moment=moment), expected, strict=True):
        assert (tuple(factor.shape), factor.dtype, factor.device.type) == (its, torch.float32, "meta")
    assert spectrum(meta).shape == (6,)
    with FakeTensorMode():
        fake = torch.empty(shape)
        for factor, its in zip(factorize(fake, 4), expected, strict=True):
            assert isinstance(factor, FakeTensor) and tuple(factor.shape) == its
        assert factorize_heads(fake, 2, 3).second.shape == (3, shape[0] // 3, 2)


@pytest.mark.parametrize("call", [factorize, lambda weight, rank, **more: spectrum(weight, **more)])
def test_bad_arguments(call: Any) -> None:
    weight, moment = random(4, 6), torch.eye(6)

    def fails(match: str, weight: Tensor = weight, **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            call(weight, 2, **more)

    fails(r"weight: expected a floating-point matrix.*got shape \(4,\)", random(4))
    fails("weight: .*dtype torch.int64", torch.ones(4, 6, dtype=torch.int64))
    fails(r"moment: expected shape \(6, 6\).*got shape \(4, 4\)", moment=torch.eye(4))
    fails("moment: .*float32 or float64, got .*torch.bfloat16", moment=moment.bfloat16())
    fails("damping: .*at least 0, got -1", moment=moment, damping=-1.0)
    fails("damping: .*got nan", damping=float("nan"))
    for value in (float("nan"), float("inf"), -float("inf")):
        fails("weight: expected finite entries", weight.clone().index_fill_(1, torch.tensor(3), value))
        fails("moment: expected finite entries", moment=moment.clone().index_fill_(1, torch.tensor(3), value))


def test_bad_ranks_and_heads() -> None:
    for rank in (0, -1, 5):
        with pytest.raises(ValueError, match=rf"rank: expected 1 to 4 for a weight of shape \(4, 6\), got {rank}"):
            factorize(random(4, 6), rank)
    with pytest.raises(ValueError, match=r"rank: expected 1 to 2 .* \(2, 6\) of each of 2 heads, got 3"):
        factorize_heads(random(4, 6), 3, 2)
    for heads in (0, 3):
        with pytest.raises(ValueError, match=f"heads: expected a divisor of the 4 rows of the weight, got {heads}"):
            factorize_heads(random(4, 6), 1, heads)
