"""Tensors between guards are those that they stand for, in all that a kernel can see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cases.ops.inputs import matrix, seed
from tests.harness import assert_same, guarded
from tests.harness.guards import GUARD, GuardedMemory, extent


@pytest.mark.parametrize(
    "tensor",
    [
        matrix(4, 3),
        matrix(4, 3).t(),
        matrix(6, 48)[:, 5:26],
        matrix(1, 8).expand(6, 8),
        matrix(0, 3),
        seed(7),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
    ],
    ids=["contiguous", "transposed", "column_slice", "expanded", "no_elements", "scalar", "bool", "complex"],
)
def test_values_strides_and_alignment_are_kept(tensor: Tensor) -> None:
    found = guarded(tensor, "cpu")
    assert_same(found.tensor, tensor)
    assert found.tensor.stride() == tensor.stride()
    bytes_into_line = [t.storage_offset() * t.element_size() % 16 for t in (found.tensor, tensor)]
    assert bytes_into_line[0] == bytes_into_line[1]
    assert min(found.begin, found.buffer.numel() - found.begin - extent(tensor)) >= GUARD
    assert found.change() is None


def test_a_gap_between_rows_is_guarded() -> None:
    found = guarded(matrix(6, 48)[:, 5:26], "cpu")
    assert bool(found.buffer[found.begin + 21].isnan())
    found.buffer[found.begin + 21] = 0
    assert found.change() == "modified in place"


def test_row_numbers_around_row_numbers_are_row_numbers() -> None:
    found = guarded(torch.tensor([0, 5, 3], dtype=torch.int32), "cpu")
    assert set(found.buffer.tolist()) == {0, 3, 5}


@pytest.mark.parametrize("fill, values", [("NaN", [float("nan"), 2**31 - 1, True]), ("12345", [12345.0, 1, True])])
def test_new_tensors_are_filled_unless_they_have_values(fill: str, values: list[float]) -> None:
    x = torch.ones(3)
    with GuardedMemory(fill) as new:
        made = [torch.empty(3), x.new_empty(3, dtype=torch.int32), torch.empty_like(x, dtype=torch.bool)]
        full = [torch.zeros(2, 2), x.new_full((2,), 5.0), torch.empty_strided((2, 2), (1, 2)).fill_(4.0)]
    for tensor, value in zip(made, values, strict=True):
        assert_same(tensor, torch.full((3,), value, dtype=tensor.dtype))
    assert [tensor.flatten().tolist() for tensor in full] == [[0.0] * 4, [5.0] * 2, [4.0] * 4]
    assert full[2].stride() == (1, 2)
    assert len(new.found) == 6 and all(found.change() is None for found in new.found)
