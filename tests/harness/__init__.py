"""One check for every implementation of every op: plain PyTorch, C++, Triton interpreted or on a GPU.

`check(case, implementation)` raises an AssertionError that names the op, the row, what differs and where. The rows are
data, in `tests/cases/ops/`. Nothing here needs pytest, so benchmarks use the same check before they time anything.
"""

from .case import OpCase, OpSpec, as_tuple
from .check import check
from .compare import assert_same, assert_within_budget
from .guards import guarded
from .implementations import has_kernel, implementation

__all__ = [
    "OpCase",
    "OpSpec",
    "as_tuple",
    "assert_same",
    "assert_within_budget",
    "check",
    "guarded",
    "has_kernel",
    "implementation",
]
