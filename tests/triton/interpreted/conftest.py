"""These tests run kernels in Triton's interpreter, which a process must choose before it first imports a kernel.

`tests/triton/test_interpreted.py` starts such a process. By hand: `TRITON_INTERPRET=1 pytest tests/triton/interpreted`.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import pytest


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    if find_spec("triton") is None:
        pytest.skip("the triton package is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a process of its own with TRITON_INTERPRET=1; tests/triton/test_interpreted.py starts it")


@pytest.fixture(autouse=True)
def small_tiles(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few keys are several tiles, and a few queries several chunks."""
    sizes = {"CHUNK_BYTES": 2000, "ESTIMATE_KEYS": 16, "SUM_KEYS": 32, "ROW_KEYS": 32, "ROW_BLOCKS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(f"memsave.ops.triton_codes.{name}", size)
    monkeypatch.setattr(import_module("memsave.ops.selected_attention_backward.triton_tiles"), "CHUNK_INDICES", 200)


@pytest.fixture(autouse=True)
def small_groups(interpreter: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that add up rows take several even of a few: for many rows the interpreter needs minutes."""
    monkeypatch.setattr("memsave.ops.triton_rows.MIN_GROUPS", 8)
