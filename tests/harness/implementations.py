"""Finds the implementations of an op by the layout of `memsave/ops/<op>/`."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def has_kernel(op: str, backend: str) -> bool:
    """Whether the op has a C++ ("native") or Triton ("triton") kernel; it may still be unable to run here."""
    return find_spec(f"memsave.ops.{op}.{backend}") is not None


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """What `backend` runs for an op, without the dispatcher and the checks of arguments before it.

    Ops without such a kernel are served by plain PyTorch, as `memsave.ops.use_backend` has it.
    """
    if backend == "reference" or not has_kernel(op, backend):
        return getattr(import_module(f"memsave.ops.{op}.reference"), op)
    return import_module(f"memsave.ops.{op}.{backend}").launch
