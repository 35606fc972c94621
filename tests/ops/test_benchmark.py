"""The benchmark of the kernels checks before it times."""

from __future__ import annotations

import pytest
import torch

from benchmarks.ops import Case, cases, measure
from memsave.ops import _backend, _native

pytestmark = pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")


def test_a_kernel_that_differs_gets_no_time() -> None:
    wrong = Case("wrong", lambda: torch.tensor(_backend.wish() == "reference"))
    with pytest.raises(ValueError, match="wrong: the kernel and plain PyTorch differ"):
        measure(wrong, threads=1, seconds=0.0)


def test_a_case_is_timed_with_both_backends() -> None:
    case = next(cases(quick=True))
    result = measure(case, threads=1, seconds=0.0)
    assert result.case == "row_inclusion + draw_rows N=256"
    assert result.speedup == result.reference_s / result.native_s > 0
