"""Fused deltas against dense sums, and the same bits in every order."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memsave.nn.sparse_mask import fuse, random_indices

from .masks import assert_valid, dense

NUMEL = 12
Part = tuple[torch.Tensor, torch.Tensor, float]


@st.composite
def part(draw: st.DrawFn, numbers: st.SearchStrategy[float]) -> Part:
    places = sorted(draw(st.sets(st.integers(0, NUMEL - 1))))
    values = draw(st.lists(numbers, min_size=len(places), max_size=len(places)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    return torch.tensor(places, dtype=torch.int32), torch.tensor(values, dtype=torch.float64).to(dtype), draw(numbers)


finite = st.floats(-100, 100) | st.sampled_from([0.0, -0.0, 1e-8, 0.1, 1 / 3])


@given(st.lists(part(finite), min_size=1, max_size=4))
def test_the_dense_sum_in_every_order(parts: list[Part]) -> None:
    indices, values = fuse(parts)
    assert_valid(indices, len({i for p in parts for i in p[0].tolist()}), NUMEL)
    expected = sum(weight * dense(i, v, (1, NUMEL)) for i, v, weight in parts)
    size = sum(abs(weight) * dense(i, v, (1, NUMEL)).abs() for i, v, weight in parts)
    error = (dense(indices, values, (1, NUMEL)) - expected).abs()
    assert bool((error <= size * torch.finfo(values.dtype).eps + torch.finfo(values.dtype).tiny).all())
    assert set(indices.tolist()) == {i for p in parts for i in p[0].tolist()}
    for order in itertools.permutations(parts):
        again, same = fuse(order)
        assert torch.equal(again, indices) and same.dtype == values.dtype
        assert torch.equal(same.view(torch.uint8), values.view(torch.uint8))


def test_sums_that_depend_on_the_order_do_not() -> None:
    """1e16 + 1 - 1e16 is 0 or 1 in float64 as the order goes."""
    place = torch.tensor([3], dtype=torch.int32)
    parts = [(place, torch.tensor([v], dtype=torch.float64), 1.0) for v in (1e16, 1.0, -1e16, 3.0, 1e-3)]
    results = {float(fuse(order)[1]) for order in itertools.permutations(parts)}
    assert len(results) == 1
    assert len({sum(float(v) for _, v, _ in order) for order in itertools.permutations(parts)}) > 1


def test_many_values() -> None:
    torch.manual_seed(1)
    parts = [
        (random_indices(10_000, 2_000, seed), torch.randn(2_000).bfloat16(), w) for seed, w in ((1, 0.5), (2, -2.0))
    ]
    indices, values = fuse(parts)
    expected = 0.5 * dense(*parts[0][:2], (100, 100)) - 2 * dense(*parts[1][:2], (100, 100))
    assert values.dtype == torch.bfloat16
    assert torch.equal(dense(indices, values, (100, 100)), expected.bfloat16().double())


def test_float64_is_rounded_once() -> None:
    place = torch.tensor([0], dtype=torch.int32)
    parts = [(place, torch.tensor([v], dtype=torch.bfloat16), 1.0) for v in (256.0, 1.0, 1.0)]
    assert float(fuse(parts)[1]) == 258.0  # rounded after each sum it would be 256


@pytest.mark.parametrize(
    ("dtypes", "widest"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float64, torch.float32), torch.float64),
    ],
)
def test_the_widest_dtype(dtypes: tuple[torch.dtype, ...], widest: torch.dtype) -> None:
    parts = [(torch.tensor([i], dtype=torch.int32), torch.ones(1, dtype=d), 1.0) for i, d in enumerate(dtypes)]
    assert fuse(parts)[1].dtype == fuse(parts[::-1])[1].dtype == widest


def test_one_part_and_empty_parts() -> None:
    empty = torch.empty(0, dtype=torch.int32), torch.empty(0), 1.0
    one = torch.tensor([1, 5], dtype=torch.int32), torch.tensor([2.0, -3.0]), 0.5
    assert [t.tolist() for t in fuse([one])] == [[1, 5], [1.0, -1.5]]
    assert [t.tolist() for t in fuse([empty, one, empty])] == [[1, 5], [1.0, -1.5]]
    with torch.device("meta"):  # the default device does not matter
        assert [t.tolist() for t in fuse([empty])] == [[], []]


def test_bad_parts() -> None:
    place = torch.tensor([1, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="at least one part"):
        fuse([])
    with pytest.raises(ValueError, match="strictly ascending"):
        fuse([(place, torch.ones(2), 1.0)])
    with pytest.raises(ValueError, match="one for each of the 1 indices"):
        fuse([(place[:1], torch.ones(2), 1.0)])
    with pytest.raises(ValueError, match="floating-point"):
        fuse([(place[:1], torch.ones(1, dtype=torch.long), 1.0)])
