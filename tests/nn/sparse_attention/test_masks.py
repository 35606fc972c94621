"""Masks of all kinds, read as which keys a query sees, and those that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memsave.nn.sparse_attention import masks

B, HEADS, GROUPS, T, S = 2, 4, 2, 5, 7
SHAPE = (B, HEADS, T, S)


def boolean(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5


def read(mask: Tensor | None) -> Any:
    return masks.visible(mask, SHAPE, GROUPS, "Here")


def test_no_mask() -> None:
    assert read(None) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
def test_keys_that_are_no_padding(dtype: torch.dtype) -> None:
    """Of one number for each key: bool, or integers where anything but 0 is a key."""
    seen = boolean(B, S)
    found = read(seen.to(dtype) * (1 if dtype == torch.bool else 3))
    assert found.dtype == torch.bool and torch.equal(found, seen[:, None, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("least", ["-inf", "lowest"])
@pytest.mark.parametrize("shape", [(B, S), (B, 1, T, S), (1, 1, T, S), (B, 1, 1, S)])
def test_masks_that_are_added(dtype: torch.dtype, least: str, shape: tuple[int, ...]) -> None:
    seen = boolean(*shape)
    number = float("-inf") if least == "-inf" else torch.finfo(dtype).min
    added = torch.zeros(shape, dtype=dtype).masked_fill_(~seen, number)
    expected = seen[:, None, None] if len(shape) == 2 else seen
    assert torch.equal(read(added), expected)


@pytest.mark.parametrize("shape", [(B, 1, T, S), (1, 1, T, S), (1, 1, 1, S)])
def test_masks_that_broadcast_are_not_repeated(shape: tuple[int, ...]) -> None:
    seen = boolean(*shape)
    assert torch.equal(read(seen), seen)


def test_of_a_longer_mask_the_first_keys_count() -> None:
    seen = boolean(B, 1, T, S + 4)
    assert torch.equal(read(seen), seen[..., :S])


@pytest.mark.parametrize(
    "shape", [(B, S + 1), (B + 1, S), (T, S), (B, 1, T + 1, S), (B, 1, T, S - 1), (3, 1, T, S), (B, T, S), (S,)]
)
def test_masks_of_other_shapes(shape: tuple[int, ...]) -> None:
    message = rf"Here: expected an attention mask of shape \(B, S\) = \(2, 7\).*got {str(shape).replace('(', '.')[:3]}"
    with pytest.raises(ValueError, match=message):
        read(boolean(*shape))


def test_a_mask_for_each_query_head_of_a_group() -> None:
    with pytest.raises(ValueError, match="Here: .* one of the 2 key/value heads .* 4 heads of its own; give one mask"):
        read(boolean(B, HEADS, T, S))
    seen = boolean(B, HEADS, T, S)
    assert torch.equal(masks.visible(seen, SHAPE, HEADS, "Here"), seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.5, 1.0, -1e4, float("nan"), float("inf")])
def test_a_bias_is_no_mask(value: float) -> None:
    bias = torch.zeros(1, 1, T, S)
    bias[0, 0, 2, 3] = value
    with pytest.raises(ValueError, match="Here: .*something else .* 0 and -inf .*ALiBi.*leave this module out"):
        read(bias)


def test_a_mask_that_was_changed_is_read_again() -> None:
    added = torch.zeros(B, 1, T, S)
    assert read(added).all()
    assert read(added).data_ptr() == read(added).data_ptr()  # read once for the layers of a model
    added[:, :, :, 2] = float("-inf")
    assert not read(added)[..., 2].any() and read(added)[..., 3].all()
    added[:, :, :, 3] = 1.0
    with pytest.raises(ValueError, match="adds something else"):
        read(added)
