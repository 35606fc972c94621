"""`sddmm`: values by hand, refusals, equal bits, bounded memory. The case table has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memsave import ops
from memsave.ops import _native
from tests.cases.ops.inputs import FLOATS, matrix, row_indices
from tests.harness import assert_same
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)
A, B, INDICES = matrix(6, 4), matrix(6, 5, value=5), row_indices(20, 7)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    b = torch.tensor([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    with ops.use_backend(backend):
        assert ops.sddmm(a, b, int32(0, 2, 4)).tolist() == [13.0, 39.0, 48.0]
        assert ops.sddmm(a, b, int32(5)).tolist() == [72.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((-1, 3), r"indices\[0\] is -1; expected strictly ascending indices in \[0, 20\)"),
        ((0, 3, 20), r"indices\[2\] is 20, behind 3"),
        ((0, 2**31 - 1), r"indices\[1\] is 2147483647"),
        ((4, 4, 5), r"indices\[1\] is 4, behind 4"),
        ((1, 8, 7, 9), r"indices\[2\] is 7, behind 8"),
        ((3, -(2**31)), r"indices\[1\] is -2147483648"),
        ((20,), r"indices\[0\] is 20; expected"),
    ],
)
def test_wrong_indices_are_refused(indices: tuple[int, ...], message: str, backend: str) -> None:
    with ops.use_backend(backend), pytest.raises(IndexError, match=message):
        ops.sddmm(A, B, int32(*indices))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_matrix_without_elements_has_no_entries(backend: str) -> None:
    with ops.use_backend(backend), pytest.raises(IndexError, match=r"in \[0, 0\)"):
        ops.sddmm(A[:, :0], B, int32(0))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((A.int(), B, INDICES), "a must be a 2-D float16"),
        ((A[0], B, INDICES), "a must be a 2-D"),
        ((A, B.half(), INDICES), "b must be a 2-D torch.float32"),
        ((A, B[0], INDICES), "b must be a 2-D"),
        ((A, B[:5], INDICES), "b must have one entry for each of the 6 rows of a"),
        ((A, B, INDICES.long()), "indices must be a 1-D torch.int32"),
        ((A, B, INDICES[None]), "indices must be a 1-D"),
        ((A, B, INDICES.to("meta")), "one device; got a on cpu"),
    ],
)
def test_bad_input_is_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sddmm(*args)


def test_a_matrix_beyond_int32_is_refused() -> None:
    """2^31 - 1 elements are the most, on meta and on fake tensors too; it is a prime, hence one row."""
    for mode, device in ((FakeTensorMode(), "cpu"), (torch.device("meta"), "meta")):
        with mode:
            one, largest = (torch.empty(3, size, device=device) for size in (1, 2**31 - 1))
            indices = torch.empty(9, dtype=torch.int32, device=device)
            assert ops.sddmm(one, largest, indices).shape == (9,)
            square = torch.empty(3, 46341, device=device)  # 46340 squared is below 2^31
            assert ops.sddmm(square[:, 1:], square[:, 1:], indices).shape == (9,)
            with pytest.raises(ValueError, match="2147483647 elements at most, .* got 46341 x 46341"):
                ops.sddmm(square, square, indices)
            with pytest.raises(ValueError, match="got 2 x 2147483647"):
                ops.sddmm(square[:, :2], largest, indices)


@pytest.mark.skipif("native" not in BACKENDS, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_and_of_entries_changes_no_bits(dtype: torch.dtype) -> None:
    """Also where all entries are in one row, and where an entry has no three neighbours to be summed with."""
    a, b, every = matrix(600, 150, dtype), matrix(600, 70, dtype, value=5), torch.arange(150 * 70, dtype=torch.int32)
    with ops.use_backend("native"):
        with threads(1):
            expected = ops.sddmm(a, b, every)
        for chosen in (every, every[:70], every[70 * 149 :], row_indices(150 * 70, 900), every[5000:5001]):
            for count in (1, 2, 3):
                with threads(count):
                    assert_same(ops.sddmm(a, b, chosen), expected[chosen])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_product_is_never_there(backend: str) -> None:
    """The weight of a large layer, at 1%: the dense gradient has 224 MiB, the result 2.2 MiB."""
    with ops.use_backend(backend), FakeTensorMode():
        a, b = (torch.empty(8192, size) for size in (14336, 4096))
        indices = torch.empty(14336 * 4096 // 100, dtype=torch.int32)
        declared = ops.workspace_bytes("sddmm", (a, b, indices))
        assert 2**20 <= declared <= 8 * 2**20
