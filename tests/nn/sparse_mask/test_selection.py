"""The largest scores and structured masks, against sorting and counting one by one.

R rows, C columns, K entries in the mask.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import memsave
from memsave.nn.sparse_mask import largest, selection, struct_indices

from .masks import assert_valid

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def by_sorting(scores: torch.Tensor, k: int) -> list[int]:
    values = scores.flatten().tolist()
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:k])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 37, 499, 500])
def test_largest_by_sorting(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(1)
    scores = (torch.randn(20, 25, dtype=torch.float64) * torch.randn(20, 25).exp()).to(dtype)
    mask = largest(scores, k)
    assert_valid(mask, k, 500)
    assert mask.tolist() == by_sorting(scores, k)


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), 5e-324, 1e-40, 6e-8, -6e-8, 65504.0, 1.0 + 2**-23]


@given(st.lists(st.sampled_from(SPECIAL) | st.floats(allow_nan=False), max_size=40), st.data())
@example([0.0, -0.0, 0.0, -0.0], None)
def test_largest_of_any_numbers(values: list[float], data: st.DataObject | None) -> None:
    k = data.draw(st.integers(0, len(values))) if data else 2
    for dtype in DTYPES:
        scores = torch.tensor(values, dtype=torch.float64).to(dtype)
        assert largest(scores, k).tolist() == by_sorting(scores, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_64_bits_decide(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    scores = torch.ones(9, dtype=dtype)
    scores[4], scores[7] = 1 + step, 1 + 2 * step
    assert largest(scores, 2).tolist() == [4, 7]
    assert largest(-scores, 7).tolist() == [0, 1, 2, 3, 5, 6, 8]
    assert largest(scores, 4).tolist() == [0, 1, 4, 7]


def test_the_lowest_positions_win_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.tensor([0.0, 2.0, 1.0, 1.0, 3.0, 1.0, 1.0, 2.0])
    for size in range(1, 10):
        monkeypatch.setattr(selection, "_ENTRIES_AT_ONCE_CPU", size)
        for k in range(9):
            assert largest(scores, k).tolist() == by_sorting(scores, k)


def test_neither_layout_nor_threads_decide() -> None:
    torch.manual_seed(2)
    scores = torch.randint(0, 50, (300, 400)).bfloat16()
    mask = largest(scores, 5_000)
    assert mask.tolist() == by_sorting(scores, 5_000)
    assert torch.equal(largest(scores.t().contiguous().t(), 5_000), mask)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(largest(scores, 5_000), mask)
    finally:
        torch.set_num_threads(threads)


def test_the_default_device_does_not_matter() -> None:
    scores = torch.tensor([1.0, 3.0, 2.0])
    with torch.device("meta"):
        assert largest(scores, 2).tolist() == [1, 2]
        assert struct_indices((2, 3), 4).tolist() == struct_one_by_one((2, 3), 4)


def test_a_parameter_is_a_score() -> None:
    assert largest(torch.nn.Parameter(torch.tensor([1.0, 3.0, 2.0])), 2).tolist() == [1, 2]


def test_temporaries_do_not_grow_with_the_scores() -> None:
    scores = torch.randn(2**22)
    profile = memsave.measure(lambda: largest(scores, 1_000))
    assert profile.peak_bytes - profile.baseline_bytes < 40 * 2**18


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_an_error(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ENTRIES_AT_ONCE_CPU", 2)
    scores = torch.tensor([1.0, 2.0, 3.0, float("nan")], dtype=dtype)
    with pytest.raises(ValueError, match="NaN, found one at flat position 3"):
        largest(scores, 1)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="0 to 3 entries.*got 4"):
        largest(torch.ones(3), 4)
    with pytest.raises(ValueError, match="got torch.int64"):
        largest(torch.ones(3, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="0 to 6 entries.*got 7"):
        struct_indices((2, 3), 7)


def struct_one_by_one(shape: tuple[int, int], k: int) -> list[int]:
    """The definition in loops: fewest lines that reach k, then the excess off the end of the last line."""
    rows, columns = shape
    short, long = min(shape), max(shape)
    if k <= short:
        return [i * short // k * (columns + 1) for i in range(k)]
    mask = [(i, i) for i in range(short)]
    n = 0
    while len(mask) < k:
        n += 1
        mask = [(i, i) for i in range(short)]
        for line in (i * long // n for i in range(n)):
            cells = [(line, place) if columns <= rows else (place, line) for place in range(short)]
            mask += [cell for cell in cells if cell not in mask]
    return sorted(r * columns + c for r, c in mask[:k])


@given(st.integers(1, 9), st.integers(1, 9))
@example(1, 1)
def test_struct_one_by_one(rows: int, columns: int) -> None:
    for k in range(rows * columns + 1):
        mask = struct_indices((rows, columns), k)
        assert_valid(mask, k, rows * columns)
        assert mask.tolist() == struct_one_by_one((rows, columns), k)


def test_struct_of_a_wide_and_a_tall_matrix() -> None:
    """Whole columns of the wide one and whole rows of the tall one, evenly spaced."""
    picture = torch.zeros(4, 12, dtype=torch.int32)
    picture.view(-1)[struct_indices((4, 12), 4 + 3 * 4 - 1).long()] = 1
    assert picture.tolist() == [
        [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0],
    ]
    tall = torch.zeros(12, 4, dtype=torch.int32)
    tall.view(-1)[struct_indices((12, 4), 4 + 3 * 4 - 1).long()] = 1
    assert torch.equal(tall.t(), picture)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_struct_of_an_empty_matrix(shape: tuple[int, int]) -> None:
    assert_valid(struct_indices(shape, 0), 0, 0)


def test_struct_of_a_large_matrix() -> None:
    mask = struct_indices((14336, 4096), 587_203)
    assert_valid(mask, 587_203, 14336 * 4096)
