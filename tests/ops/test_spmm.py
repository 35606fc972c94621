"""`spmm`: values by hand, refusals, equal bits, bounded memory. The case table has the rest."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave import ops
from memsave.ops import _native
from tests.cases.ops.inputs import FLOATS, matrix, row_indices, scales
from tests.harness import assert_same
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)
X, VALUES, INDICES = matrix(6, 4), scales(7), row_indices(20, 7)  # S is (4, 5)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """S = [[2, 0, 3], [0, 5, 0]]."""
    values, indices = torch.tensor([2.0, 3.0, 5.0]), int32(0, 2, 4)
    with ops.use_backend(backend):
        x = torch.tensor([[1.0, 10.0], [0.0, -1.0]])
        assert ops.spmm(x, values, indices, 2, 3, False).tolist() == [[2.0, 50.0, 3.0], [0.0, -5.0, 0.0]]
        x = torch.tensor([[1.0, 10.0, 100.0]])
        assert ops.spmm(x, values, indices, 2, 3, True).tolist() == [[302.0, 50.0]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((-1, 3), r"indices\[0\] is -1; expected strictly ascending indices in \[0, 20\)"),
        ((0, 3, 20), r"indices\[2\] is 20, behind 3"),
        ((0, 2**31 - 1), r"indices\[1\] is 2147483647"),
        ((4, 4, 5), r"indices\[1\] is 4, behind 4"),
        ((1, 8, 7, 9), r"indices\[2\] is 7, behind 8"),
        ((20,), r"indices\[0\] is 20; expected"),
    ],
)
def test_wrong_indices_are_refused(indices: tuple[int, ...], message: str, backend: str, transposed: bool) -> None:
    x = matrix(6, 5) if transposed else X
    with ops.use_backend(backend), pytest.raises(IndexError, match=message):
        ops.spmm(x, scales(len(indices)), int32(*indices), 4, 5, transposed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_without_elements_has_no_entries(backend: str) -> None:
    with ops.use_backend(backend), pytest.raises(IndexError, match=r"in \[0, 0\)"):
        ops.spmm(X, scales(1), int32(0), 4, 0, False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.int(), VALUES, INDICES, 4, 5, False), "x must be a 2-D float16"),
        ((X[0], VALUES, INDICES, 4, 5, False), "x must be a 2-D"),
        ((X, VALUES.int(), INDICES, 4, 5, False), "values must be a 1-D float16"),
        ((X, VALUES[:6], INDICES, 4, 5, False), "values must have one entry for each of the 7 indices"),
        ((X, VALUES, INDICES.long(), 4, 5, False), "indices must be a 1-D torch.int32"),
        ((X, VALUES, INDICES[None], 4, 5, False), "indices must be a 1-D"),
        ((X, VALUES, INDICES.to("meta"), 4, 5, False), "one device; got x on cpu"),
        ((X, VALUES, INDICES, 5, 4, False), r"x must have 5 columns for a 5 x 4 matrix; got shape \(6, 4\)"),
        ((X, VALUES, INDICES, 4, 5, True), "x must have 5 columns for a 4 x 5 matrix"),
        ((X, VALUES, INDICES, 4, -1, False), "no negative size; got 4 x -1"),
    ],
)
def test_bad_input_is_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.spmm(*args)


def test_a_matrix_beyond_int32_is_refused() -> None:
    """2^31 - 1 elements are the most, on meta and on fake tensors too."""
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            x, values = torch.empty(3, 46341, device=device), torch.empty(9, device=device)
            indices = torch.empty(9, dtype=torch.int32, device=device)
            assert ops.spmm(x, values, indices, 46340, 46341, True).shape == (3, 46340)
            assert ops.spmm(x[:, :1], values, indices, 1, 2**31 - 1, False).shape == (3, 2**31 - 1)
            with pytest.raises(ValueError, match="2147483647 elements at most, .* got 46341 x 46341"):
                ops.spmm(x, values, indices, 46341, 46341, True)


@pytest.mark.skipif("native" not in BACKENDS, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_the_number_of_threads_and_of_rows_changes_no_bits(dtype: torch.dtype, transposed: bool) -> None:
    """Also where all entries are in one row, and for a part of x, which goes in other tiles."""
    x = matrix(300, 70 if transposed else 150, dtype)
    with ops.use_backend("native"):
        for chosen in (torch.arange(150 * 70, dtype=torch.int32), row_indices(150 * 70, 900), int32(*range(700, 770))):
            args = scales(chosen.shape[0]).to(dtype), chosen, 150, 70, transposed
            with threads(1):
                expected = ops.spmm(x, *args)
            for count in (1, 2, 3):
                with threads(count):
                    assert_same(ops.spmm(x, *args), expected)
                    for part in (slice(0, 1), slice(7, 96), slice(100, 300)):
                        assert_same(ops.spmm(x[part], *args), expected[part])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_differs_from_a_dense_product_where_numbers_are_not_finite(backend: str, transposed: bool) -> None:
    """What is not an entry multiplies nothing."""
    x = torch.full((3, 4), torch.inf)
    with ops.use_backend(backend):
        out = ops.spmm(x, scales(2), int32(0, 5), 4, 4, transposed)
    assert out.tolist() == [[torch.inf, torch.inf, 0.0, 0.0]] * 3


def test_no_warning_comes_from_torch() -> None:
    with warnings.catch_warnings(), ops.use_reference():
        warnings.simplefilter("error")
        ops.spmm(X, VALUES, INDICES, 4, 5, False)


@pytest.mark.skipif("native" not in BACKENDS, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize("transposed", [False, True])
def test_no_dense_matrix_and_no_copy_of_x_is_there(transposed: bool) -> None:
    """The weight of a large layer, at 1%: the dense matrix has 224 MiB, x 128 MiB or more."""
    with ops.use_backend("native"), FakeTensorMode():
        x, k = torch.empty(8192, 4096 if transposed else 14336), 14336 * 4096 // 100
        indices = torch.empty(k, dtype=torch.int32)
        declared = ops.workspace_bytes("spmm", (x, torch.empty(k), indices, 14336, 4096, transposed))
        assert 2**20 <= declared <= 10 * 2**20
