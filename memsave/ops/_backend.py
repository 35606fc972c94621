"""Which implementation serves an op: plain PyTorch ("reference"), C++ on the CPU ("native"), Triton on CUDA ("triton").

Without a wish, the fastest one that works is taken. `MEMSAVE_BACKEND`, `use_backend` and `use_reference` express a
wish, for the whole process: backward passes run in threads of their own, which a setting per thread would not reach.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec

import torch

from ..errors import MemsaveError
from . import _native

BACKENDS = ("reference", "native", "triton")
DEVICE_OF_KERNELS = {"native": "cpu", "triton": "cuda"}


class BackendError(MemsaveError, RuntimeError):
    """A backend was asked for by name and cannot serve."""


_wish: str | None = os.environ.get("MEMSAVE_BACKEND") or None
_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener` whenever another backend is wished for."""
    _listeners.append(listener)


def wish() -> str | None:
    """The backend asked for by name, or None.

    Raises:
        BackendError: `MEMSAVE_BACKEND` holds something else than the name of a backend.
    """
    if _wish is not None and _wish not in BACKENDS:
        raise BackendError(f"MEMSAVE_BACKEND={_wish!r}: expected one of {', '.join(BACKENDS)}; correct or unset it.")
    return _wish


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # its import is blocked: an empty entry in sys.modules
        return False


def missing(backend: str) -> str | None:
    """Why a backend cannot run on this machine, or None."""
    if backend == "native":
        return None if _native.library() is not None else _native.state()
    if backend == "triton":
        if not _installed("triton"):
            return "the triton package is not installed"
        return None if torch.cuda.is_available() else "torch sees no CUDA or ROCm device"
    return None


def _set(backend: str | None) -> None:
    global _wish
    _wish = backend
    for listener in _listeners:
        listener()


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every op by one backend inside the block. Ops that have no kernel of that kind stay with plain PyTorch.

    Args:
        backend: "reference", "native" or "triton".

    Raises:
        ValueError: no such backend.
        BackendError: it cannot run on this machine.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}.")
    if reason := missing(backend):
        raise BackendError(f"backend {backend!r} was asked for, but {reason}.")
    before = _wish
    _set(backend)
    try:
        yield
    finally:
        _set(before)


def use_reference() -> AbstractContextManager[None]:
    """Serve every op by plain PyTorch inside the block: `with memsave.ops.use_reference(): ...`."""
    return use_backend("reference")
