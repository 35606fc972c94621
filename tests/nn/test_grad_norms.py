"""The memory of gradient norms by itself: which ids it takes, what a code means, how it grows and what it takes.

B samples of T tokens; codes are (samples, tokens) uint8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import memsave
from memsave.nn import grad_norms
from memsave.nn.grad_norms import Block, GradNormCache, Visit, decode, encode, rounded_up

HALF_A_STEP = 2 ** (1 / 16)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(grad_norms, "_pending", [])
    yield
    assert grad_norms._open is None


BAD_IDS = {
    "no ids": [],
    "an empty tensor": torch.zeros(0, dtype=torch.long),
    "a negative": [3, -1],
    "a negative in a tensor": torch.tensor([3, -1]),
    "bools": [True, False],
    "a tensor of bools": torch.tensor([True, False]),
    "fractions": [1.0, 2.0],
    "a tensor of fractions": torch.tensor([1.0, 2.0]),
    "a matrix": torch.tensor([[1, 2]]),
    "a 0-d tensor": torch.tensor(3),
    "nested": [[1], [2]],
    "text": ["1", "2"],
    "a hash": [2**31],
    "one number": 3,
    "nothing": None,
}


@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids_are_an_error(ids: object) -> None:
    with pytest.raises(ValueError, match=r"sample_ids: expected .* Nothing was changed"):
        with memsave.sample_ids(ids):  # type: ignore[arg-type]
            pytest.fail("the block was entered")
    assert grad_norms._open is None


@pytest.mark.parametrize(
    "ids", [[4, 2**31 - 1], (4, 2**31 - 1), np.array([4, 2**31 - 1]), torch.tensor([4, 2**31 - 1], dtype=torch.int32)]
)
def test_ids_of_many_kinds(ids: list[int]) -> None:
    with memsave.sample_ids(ids):
        assert grad_norms._open is not None and grad_norms._open.ids.tolist() == [4, 2**31 - 1]


def test_a_block_in_a_block_is_an_error_and_the_outer_one_stays_open() -> None:
    with memsave.sample_ids([1]):
        outer = grad_norms._open
        with pytest.raises(ValueError, match="a block is open already"):
            with memsave.sample_ids([2]):
                pytest.fail("the block was entered")
        assert grad_norms._open is outer


def test_an_exception_closes_the_block() -> None:
    with pytest.raises(KeyError), memsave.sample_ids([1]):
        raise KeyError
    with memsave.sample_ids([2]):
        pass


def test_the_factor_is_halfway_between_one_and_the_norm_over_the_batchs_mean() -> None:
    norms = torch.tensor([0.01, 0.3, 0.5, 1.0, 1.4, 2.0, 40.0])
    ratio = (2 * decode(encode(norms)) - 1) / (norms / norms.mean()).clamp(min=1 / 32)
    assert ((ratio >= 1 / HALF_A_STEP / (1 + 1e-5)) & (ratio <= HALF_A_STEP * (1 + 1e-5))).all(), ratio
    assert decode(torch.zeros(1, dtype=torch.uint8)).item() == 1.0
    assert decode(encode(torch.ones(3))).tolist() == [1.0] * 3


@given(st.lists(st.floats(0.0, 1e6, width=32), min_size=1, max_size=20), st.integers(-20, 20))
def test_powers_of_two_do_not_change_a_code(values: list[float], power: int) -> None:
    norms = torch.tensor(values).where(torch.tensor(values) > 1e-6, 0.0)
    assert torch.equal(encode(norms * 2.0**power), encode(norms))


def test_padding_counts_little_and_does_not_move_the_mean() -> None:
    norms = torch.tensor([1.0, 3.0, 0.5])
    codes = encode(torch.cat([norms, torch.zeros(9)]))
    assert torch.equal(codes[:3], encode(norms))
    assert decode(codes[3:]).tolist() == [1 / 16] * 9


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_norms_that_are_not_finite_or_all_zero_count_for_nothing(value: float) -> None:
    assert encode(torch.tensor([1.0, value, 2.0])).tolist() == [0, 0, 0]
    assert encode(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_largest_possible_ratio_has_a_code() -> None:
    norms = torch.zeros(2**22)
    norms[0], norms[1:] = 1.0, 1e-20
    assert decode(encode(norms))[0].item() == pytest.approx(2**21, rel=0.05)


@given(st.integers(1, 2**31))
def test_sizes_are_rounded_up_by_at_most_an_eighth(samples: int) -> None:
    rounded = rounded_up(samples)
    assert samples <= rounded <= max(samples, samples * 9 / 8)
    assert rounded_up(rounded) == rounded


def test_there_are_few_sizes() -> None:
    assert [rounded_up(n) for n in (1, 7, 16, 17, 18, 100_000)] == [1, 7, 16, 18, 18, 106_496]
    assert len({rounded_up(n) for n in range(2**10, 2**11 + 1)}) == 9


def written(cache: GradNormCache, ids: list[int], codes: list[list[int]]) -> None:
    cache.write(Block(ids), torch.tensor(codes, dtype=torch.uint8))


def test_the_memory_grows_and_keeps_what_it_has() -> None:
    cache = GradNormCache()
    written(cache, [20, 3], [[7, 8], [9, 10]])
    assert cache.codes.shape == (22, 2)  # 21 rounded up
    written(cache, [3, 40], [[1, 2, 3], [4, 5, 6]])
    assert cache.codes.shape == (44, 3)
    expected = torch.zeros(44, 3, dtype=torch.uint8)
    expected[3], expected[20], expected[40] = (torch.tensor(row) for row in ([1, 2, 3], [7, 8, 0], [4, 5, 6]))
    assert torch.equal(cache.codes, expected)


def test_a_shorter_visit_leaves_the_other_tokens_and_a_lost_one_all() -> None:
    cache = GradNormCache()
    written(cache, [0, 1], [[1, 2, 3], [4, 5, 6]])
    written(cache, [0], [[9, 8]])
    written(cache, [1], [[0, 0, 0]])
    assert cache.codes.tolist() == [[9, 8, 3], [4, 5, 6]]


def test_of_a_sample_that_is_there_twice_the_last_place_counts() -> None:
    cache = GradNormCache()
    written(cache, [1, 0, 1], [[1], [2], [3]])
    assert cache.codes.tolist() == [[2], [3]]


@pytest.mark.parametrize("surroundings", [torch.inference_mode, lambda: torch.device("meta")])
def test_it_can_be_written_and_read_whatever_the_mode_or_default_device_was(surroundings: Any) -> None:
    """Evaluation in inference mode may open blocks, too; a script may set a default device."""
    visit = Visit(cache := GradNormCache(), Block([0]), rows=2)
    visit.add(torch.ones(2, 3))
    with surroundings():
        with memsave.sample_ids([1]):
            assert cache.factors(torch.tensor([0], device="cpu"), 2, torch.device("cpu")).tolist() == [[1, 1]]  # type: ignore[union-attr]
            assert grad_norms._open is not None and grad_norms._open.ids.tolist() == [1]
        loaded = GradNormCache()
        loaded.load(cache.codes)
    for each in (cache, loaded):
        written(each, [0], [[9, 8]])
        assert each.codes.tolist() == [[9, 8]] and each.codes.device.type == "cpu"


def factors(cache: GradNormCache, ids: list[int], tokens: int) -> Tensor | None:
    return cache.factors(torch.tensor(ids), tokens, torch.device("cpu"))


def test_what_was_never_seen_counts_as_average() -> None:
    cache = GradNormCache()
    assert factors(cache, [0], 2) is None
    written(cache, [1], [[1, 42 + 8]])  # zero, and twice the mean
    assert factors(cache, [1000], 2) is None
    found = factors(cache, [1000, 1, 0], 3)
    assert found is not None and found.tolist() == [[1, 1, 1], [1 / 16, 1.5, 1], [1, 1, 1]]
    shorter = factors(cache, [1], 1)
    assert shorter is not None and shorter.tolist() == [[1 / 16]]
