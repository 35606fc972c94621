"""Indices as bytes: round trips, sizes, and what damaged bytes give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import memsave
from memsave.nn.sparse_mask import decode_gaps, encode_gaps, random_indices

from .masks import assert_valid

LAST = 2**31 - 2


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def uint8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def one_by_one(indices: list[int]) -> list[int]:
    """The code, number by number."""
    codes, after = [], 0
    for index in indices:
        gap, after = index - after, index + 1
        while gap >= 128:
            codes.append(gap % 128 + 128)
            gap //= 128
        codes.append(gap)
    return codes


BOUNDS = [bound + d for place in range(1, 5) for bound in (2 ** (7 * place),) for d in (-1, 0, 1)] + [LAST]
masks = st.sets(st.integers(0, LAST) | st.integers(0, 300) | st.sampled_from(BOUNDS), max_size=40).map(sorted)


@given(masks)
@example([])
@example([0])
@example([LAST])
@example([0, LAST])
@example([LAST - 1, LAST])
def test_round_trip(values: list[int]) -> None:
    indices = int32(values)
    codes = encode_gaps(indices)
    assert codes.tolist() == one_by_one(values)
    assert torch.equal(decode_gaps(codes, len(values), 2**31 - 1), indices)
    if values:
        assert torch.equal(decode_gaps(codes, len(values), values[-1] + 1), indices)
        with pytest.raises(ValueError, match="beyond the matrix|go up to|0 to .* entries"):
            decode_gaps(codes, len(values), values[-1])  # one too small


@pytest.mark.parametrize("bound", BOUNDS)
def test_lengths_at_the_bounds(bound: int) -> None:
    codes = encode_gaps(int32([bound]))
    assert codes.tolist() == one_by_one([bound])


def test_the_default_device_does_not_matter() -> None:
    indices = int32([0, 5, 5000])
    with torch.device("meta"):
        assert torch.equal(decode_gaps(encode_gaps(indices), 3, 5001), indices)


@pytest.mark.parametrize(("density", "bytes_per_index"), [(0.001, 1.9), (0.01, 1.3), (0.1, 1.01)])
@pytest.mark.parametrize("seed", [1, 2])
def test_bytes_per_value(density: float, bytes_per_index: float, seed: int) -> None:
    """With bf16 values at most 4.2 bytes for each."""
    numel = 2048 * 2048
    k = round(density * numel)
    indices = random_indices(numel, k, seed)
    codes = encode_gaps(indices)
    assert codes.numel() <= bytes_per_index * k
    assert 2 * k + codes.numel() <= 4.2 * k
    assert torch.equal(decode_gaps(codes, k, numel), indices)


@pytest.mark.parametrize(
    ("codes", "k", "numel", "match"),
    [
        (uint8(), 1, 10, "1 coded indices take 1 to 5 bytes, but there are 0"),
        (uint8(1), 0, 10, "take 0 to 0 bytes, but there are 1"),
        (uint8(1, 200), 2, 300, "truncated"),
        (uint8(200, 1, 200), 1, 300, "truncated"),
        (uint8(1, 2, 3), 2, 300, "must hold 2 indices, but it holds 3"),
        (uint8(1, 2, 3), 1, 300, "must hold 1 indices, but it holds 3"),
        (uint8(129, 2, 3), 3, 300, "must hold 3 indices, but it holds 2"),
        (uint8(129, 129, 129, 129, 129, 1, 1), 2, 300, "a number of 6 bytes"),
        (uint8(129, 0), 1, 300, "needless zero"),
        (uint8(128, 128, 128, 128, 0, 1), 2, 300, "needless zero"),
        (uint8(5, 5), 2, 11, "go up to 11, but the matrix has 11"),
        (uint8(11), 1, 11, "gap beyond the matrix"),
        (uint8(255, 255, 255, 255, 127), 1, 2**31 - 1, "gap beyond the matrix"),
        (uint8(254, 255, 255, 255, 7, 0), 2, 2**31 - 1, "go up to 2,147,483,647"),
        (uint8(1, 1), 2, 1, "0 to 1 entries"),
        (uint8(1, 1), -1, 10, "0 to 10 entries"),
        (uint8(1, 1), 2, 2**31, "entries"),
        (uint8(1, 1).int(), 2, 10, "uint8"),
        (uint8(1, 1).view(1, 2), 2, 10, "1-D"),
    ],
)
def test_what_is_wrong_is_said(codes: torch.Tensor, k: int, numel: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        decode_gaps(codes, k, numel)


@given(st.binary(max_size=40), st.integers(0, 40), st.sampled_from([1, 40, 200, 20_000, 2**31 - 1]))
def test_any_bytes_give_an_error_or_a_mask(data: bytes, k: int, numel: int) -> None:
    codes = torch.tensor(list(data), dtype=torch.uint8)
    try:
        indices = decode_gaps(codes, k, numel)
    except ValueError:
        return
    assert_valid(indices, k, numel)
    assert encode_gaps(indices).tolist() == list(data)


@settings(max_examples=300)
@given(masks, st.data())
def test_damaged_bytes_give_an_error_or_another_mask(values: list[int], data: st.DataObject) -> None:
    codes = encode_gaps(int32(values)).tolist()
    kind = data.draw(st.sampled_from(["change", "cut", "add", "drop"]))
    place = data.draw(st.integers(0, max(len(codes) - 1, 0)))
    byte = data.draw(st.integers(0, 255))
    damaged = {
        "change": [*codes[:place], byte, *codes[place + 1 :]],
        "cut": codes[:place],
        "add": [*codes, byte],
        "drop": [*codes[:place], *codes[place + 1 :]],
    }[kind]
    try:
        indices = decode_gaps(uint8(*damaged), len(values), 2**31 - 1)
    except ValueError:
        return
    assert_valid(indices, len(values), 2**31 - 1)
    assert (indices.tolist() == values) == (damaged == codes)
    assert kind not in ("cut", "add") or damaged == codes


def test_claims_cost_no_memory() -> None:
    """A file may claim two billion indices: nothing of that size is allocated, and few bytes cost few."""

    def refused() -> None:
        with pytest.raises(ValueError):
            decode_gaps(uint8(*[0] * 1000), 2**31 - 1, 2**31 - 1)

    assert memsave.measure(refused).peak_bytes < 10_000
    codes = uint8(*[0] * 1000)
    assert memsave.measure(lambda: decode_gaps(codes, 1000, 2**31 - 1)).peak_bytes < 100_000


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (int32([3, 3]), "strictly ascending"),
        (int32([3, 2]), "strictly ascending"),
        (int32([-1, 2]), "from -1 to 2"),
        (int32([1]).long(), "int32"),
        (int32([1]).view(1, 1), "1-D"),
    ],
)
def test_what_is_no_mask_has_no_code(indices: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode_gaps(indices)
