"""These tests run kernels in Triton's interpreter, which a process must choose before it first imports a kernel.

`tests/triton/test_interpreted.py` starts such a process. By hand: `TRITON_INTERPRET=1 pytest tests/triton/interpreted`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    if find_spec("triton") is None:
        pytest.skip("the triton package is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process of its own with TRITON_INTERPRET=1; tests/triton/test_interpreted.py starts it")


@pytest.fixture(autouse=True)
def empties_hold_nan() -> Iterator[None]:
    """A kernel that leaves a part of its output unwritten shows NaN there, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
