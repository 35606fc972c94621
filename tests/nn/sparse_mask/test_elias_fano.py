"""Masks as bytes: round trips, sizes, and what damaged bytes give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memsave.nn.sparse_mask import random_indices
from memsave.nn.sparse_mask.elias_fano import decode, encode, num_bytes

from .masks import assert_valid

LAST = 2**31 - 2


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def one_by_one(positions: list[int], numel: int) -> list[int]:
    """The code, bit by bit."""
    k = len(positions)
    low = max(0, (numel // max(k, 1)).bit_length() - 1)
    lower = [position >> bit & 1 for position in positions for bit in range(low)]
    upper = [0] * (k + (max(numel - 1, 0) >> low) + 1)
    for i, position in enumerate(positions):
        upper[(position >> low) + i] = 1
    return [*in_bytes(lower), *in_bytes(upper)]


def in_bytes(bits: list[int]) -> list[int]:
    padded = [*bits, *[0] * (-len(bits) % 8)]
    return [sum(bit << place for place, bit in enumerate(padded[i : i + 8])) for i in range(0, len(padded), 8)]


masks = st.integers(1, 400).flatmap(
    lambda numel: st.tuples(st.sets(st.integers(0, numel - 1)).map(sorted), st.just(numel))
)


@given(masks)
@example(([], 1))
@example(([0], 1))
@example((list(range(9)), 9))
def test_round_trip(mask: tuple[list[int], int]) -> None:
    positions, numel = mask
    code = encode(int32(positions), numel)
    assert code.tolist() == one_by_one(positions, numel)
    assert code.shape == (num_bytes(len(positions), numel),)
    assert torch.equal(decode(code, len(positions), numel), int32(positions))


@pytest.mark.parametrize("positions", [[LAST], [0, LAST], [LAST - 1, LAST], [0, 2**24 + 1, 2**30]])
def test_large_matrices(positions: list[int]) -> None:
    """With many positions for one value the upper part stays short."""
    code = encode(int32(positions), LAST + 1)
    assert torch.equal(decode(code, len(positions), LAST + 1), int32(positions))
    assert code.numel() < 20


def test_the_default_device_does_not_matter() -> None:
    positions = int32([0, 5, 5000])
    with torch.device("meta"):
        assert torch.equal(decode(encode(positions, 5001), 3, 5001), positions)


@pytest.mark.parametrize(("density", "bytes_per_value"), [(0.001, 1.5), (0.01, 1.08), (0.1, 0.7), (0.5, 0.4)])
def test_bytes_per_value(density: float, bytes_per_value: float) -> None:
    """With bf16 values at most 4.2 bytes for each."""
    numel = 2048 * 2048
    k = round(density * numel)
    positions = random_indices(numel, k, 1)
    code = encode(positions, numel)
    assert code.numel() <= bytes_per_value * k
    assert 2 * k + code.numel() <= 4.2 * k
    assert torch.equal(decode(code, k, numel), positions)


def test_a_code_of_another_size_is_refused() -> None:
    code = encode(int32([3, 70]), 100)
    for wrong in (code[:-1], torch.cat((code, code[:1])), code.int(), code.view(1, -1)):
        with pytest.raises(ValueError, match="expected the mask of 2 of 100 entries as"):
            decode(wrong, 2, 100)


def test_what_is_no_mask_is_refused() -> None:
    code = encode(int32([3, 70]), 100)
    with pytest.raises(ValueError, match="does not hold 2 positions"):
        decode(torch.zeros_like(code), 2, 100)
    low = (100 // 2).bit_length() - 1
    swapped = code.clone()
    swapped[0], swapped[1] = 70 & 31, 0  # the lower bits of the first are those of the second, 70 stays below 96
    assert low == 5 and decode(swapped, 2, 100)[0] == 6
    beyond = encode(int32([3, 100]), 101)
    if beyond.shape == code.shape:
        with pytest.raises(ValueError, match="not below 100"):
            decode(beyond, 2, 100)


@given(st.binary(min_size=8, max_size=8), st.sampled_from([(3, 100), (7, 40), (1, 2**20), (20, 30)]))
def test_any_bytes_give_an_error_or_a_mask(data: bytes, size: tuple[int, int]) -> None:
    k, numel = size
    code = torch.tensor([*data, *[0] * 40][: num_bytes(k, numel)], dtype=torch.uint8)
    try:
        positions = decode(code, k, numel)
    except ValueError:
        return
    assert_valid(positions, k, numel)
    assert torch.equal(encode(positions, numel), code)  # each mask has one code
