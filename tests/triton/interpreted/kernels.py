"""The rows of the case table that the interpreter runs, and how.

bfloat16 is left out: the interpreter gets it wrong without an error. So are tensors of many rows, which take minutes;
`conftest.py` sees to it that a program adds up several rows of a small one. `tests/triton/test_gpu.py` has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.cases.ops import CASES
from tests.harness import OpCase, check, has_kernel


def runs(case: OpCase) -> bool:
    too_many = case.name.endswith("many_rows") or case.name.startswith("tall_")
    return not too_many and not any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in case.make())


KERNEL_CASES = [case for case in CASES if has_kernel(case.op, "triton") and runs(case)]


def interpret(case: OpCase, launch: Callable[..., Any]) -> None:
    """The interpreter is the same in deterministic mode: once is enough."""
    check(case, launch, deterministic=(False,))
