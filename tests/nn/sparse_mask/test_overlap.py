"""The measures of overlap against dense matrices.

Deltas A1, A2 (N, m).
"""

from __future__ import annotations

import pytest
import torch

import memsave
from memsave.nn.sparse_mask import awom, awor, overlap, random_indices, struct_indices

from .masks import dense

Delta = tuple[torch.Tensor, torch.Tensor]


def delta(shape: tuple[int, int], k: int, seed: int) -> Delta:
    torch.manual_seed(seed)
    return random_indices(shape[0] * shape[1], k, seed), torch.randn(k)


def by_hand(first: Delta, second: Delta, shape: tuple[int, int]) -> tuple[float, float]:
    product = dense(*first, shape).T @ dense(*second, shape)
    return float(torch.linalg.svdvals(product)[0]), 1 - int((product != 0).sum()) / shape[1] ** 2


@pytest.mark.parametrize("shape", [(30, 20), (7, 40), (1, 9), (9, 1), (100, 270), (10, 300)])
@pytest.mark.parametrize("density", [0.03, 0.3])
def test_random_masks(shape: tuple[int, int], density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    k = max(1, round(density * shape[0] * shape[1]))
    first, second = delta(shape, k, 1), delta(shape, k, 2)
    norm, ratio = by_hand(first, second, shape)
    assert awom(first, second, shape) == pytest.approx(norm, rel=1e-8, abs=1e-300)
    assert awor(first, second, shape) == pytest.approx(ratio, abs=1e-15)
    monkeypatch.setattr(overlap, "_EXACT_COLUMNS", 0)
    assert awom(first, second, shape) == pytest.approx(norm, rel=1e-8, abs=1e-300)
    monkeypatch.setattr(
        overlap, "_ENTRIES_AT_ONCE", 50 if shape[1] < 100 else 20_000
    )  # some rows of the product, some entries at a time
    assert awor(first, second, shape) == pytest.approx(ratio, abs=1e-15)
    monkeypatch.setattr(overlap, "_EXACT_COLUMNS", 10**6)
    assert awom(first, second, shape) == pytest.approx(norm, rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("exact_columns", [0, 1000])
def test_identical_and_disjoint_masks(exact_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_EXACT_COLUMNS", exact_columns)
    shape = (40, 50)
    one = delta(shape, 100, 3)
    norm, ratio = by_hand(one, one, shape)
    assert awom(one, one, shape) == pytest.approx(norm, rel=1e-8)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(dense(*one, shape), 2)) ** 2)
    assert awor(one, one, shape) == pytest.approx(ratio)
    upper = torch.arange(0, 20 * 50, 7, dtype=torch.int32)  # rows 0 to 19
    lower = upper + 20 * 50
    values = torch.randn(upper.numel())
    assert awom((upper, values), (lower, values), shape) == 0.0
    assert awor((upper, values), (lower, values), shape) == 1.0
    interleaved = one[0][::2], one[1][::2]
    rest = one[0][1::2], one[1][1::2]  # disjoint masks whose rows meet
    norm, ratio = by_hand(interleaved, rest, shape)
    assert norm > 0 and awom(interleaved, rest, shape) == pytest.approx(norm, rel=1e-8)
    assert awor(interleaved, rest, shape) == pytest.approx(ratio)


@pytest.mark.parametrize("exact_columns", [0, 1000])
def test_empty_masks_and_zero_values(exact_columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_EXACT_COLUMNS", exact_columns)
    shape = (40, 50)
    empty, one = delta(shape, 0, 3), delta(shape, 100, 3)
    zeros = one[0], torch.zeros(100)
    for other in (empty, zeros):
        for pair in ((one, other), (other, one), (other, other)):
            assert awom(*pair, shape) == 0.0
            assert awor(*pair, shape) == 1.0
    for none in ((0, 5), (5, 0), (0, 0)):
        assert awom(empty, empty, none) == 0.0
        assert awor(empty, empty, none) == 1.0


def test_what_cancels_is_zero() -> None:
    first = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1.0, 1.0])  # A1 = [[1, 0], [1, 0]]
    second = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2.0, -2.0])
    assert awor(first, second, (2, 2)) == 1.0 and awom(first, second, (2, 2)) == 0.0


def test_equal_singular_values_and_rank_one() -> None:
    """Where power iteration would crawl or Lanczos breaks down."""
    m = 300
    eye = struct_indices((m, m), m)
    assert awom((eye, torch.ones(m)), (eye, torch.ones(m)), (m, m)) == pytest.approx(1.0, rel=1e-12)
    nearly = 1 - torch.arange(m, dtype=torch.float64) * 1e-6
    assert awom((eye, nearly), (eye, torch.ones(m)), (m, m)) == pytest.approx(1.0, rel=1e-8)
    row = torch.arange(m, dtype=torch.int32)
    assert awom((row, torch.ones(m)), (row, torch.ones(m)), (m, m)) == pytest.approx(m, rel=1e-12)


def test_no_dense_product_is_held() -> None:
    shape = (64, 6000)
    pair = delta(shape, 4000, 1), delta(shape, 4000, 2)
    profile = memsave.measure(lambda: (awor(*pair, shape), awom(*pair, shape)))
    assert profile.peak_bytes < 6000 * 6000 * 8 / 2
    assert memsave.measure(lambda: awom(*pair, shape)).peak_bytes < 80 * 6000 * 8


def test_the_same_on_every_call() -> None:
    shape = (50, 400)
    pair = delta(shape, 900, 1), delta(shape, 900, 2)
    state = torch.get_rng_state()
    with torch.device("meta"):
        values = {awom(*pair, shape), awor(*pair, shape)}
    assert values == {awom(*pair, shape), awor(*pair, shape)}
    assert torch.equal(torch.get_rng_state(), state)
    assert len(values) == 2


def test_bfloat16_values_and_gradients() -> None:
    shape = (20, 30)
    indices, values = delta(shape, 60, 1)
    pair = (indices, values.bfloat16().requires_grad_()), (indices, values.half())
    norm, ratio = by_hand((indices, values.bfloat16()), (indices, values.half()), shape)
    assert awom(*pair, shape) == pytest.approx(norm) and awor(*pair, shape) == pytest.approx(ratio)


def test_bad_deltas() -> None:
    indices, values = delta((20, 30), 60, 1)
    for measure in (awom, awor):
        with pytest.raises(ValueError, match=r"lie in \[0, 100\)"):
            measure((indices, values), (indices, values), (10, 10))
        with pytest.raises(ValueError, match="one for each of the 60"):
            measure((indices, values[1:]), (indices, values), (20, 30))
        with pytest.raises(ValueError, match="int32"):
            measure((indices, values), (indices.long(), values), (20, 30))
