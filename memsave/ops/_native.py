"""Loads the C++ kernels, `memsave/_libmemsave`, and lends them torch's own threads.

The library includes no torch header and links no torch library, so one binary serves every torch. Its kernels take raw
pointers, and split their work by a function that is handed to them here: `torch_parallel_for`, a C symbol of
libtorch_cpu (torch 2.10 and later). So `torch.set_num_threads` applies, and there is no second thread pool.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    "Darwin": ("_libmemsave.dylib", "libtorch_cpu.dylib"),
    "Windows": ("_libmemsave.dll", "torch_cpu.dll"),
}
LIBRARY_NAME, _TORCH_NAME = _NAMES.get(platform.system(), ("_libmemsave.so", "libtorch_cpu.so"))
LIBRARY_PATH = Path(__file__).parent.parent / LIBRARY_NAME

# Raised by a change of any kernel's arguments, here and in csrc/common.h: a stale library is refused, not called.
ABI_VERSION = 7

# DType in csrc/common.h.
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, and its state in words."""
    if not LIBRARY_PATH.exists():
        return None, f"{LIBRARY_NAME} was not built (no C++ compiler at installation?)"
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
        found = library.ms_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{LIBRARY_NAME} does not load: {error}"
    if found != ABI_VERSION:
        return None, f"{LIBRARY_NAME} is of version {found}, not {ABI_VERSION}: install memsave again"
    return library, f"loaded {LIBRARY_NAME}, {_lend_threads(library)}"


def _lend_threads(library: ctypes.CDLL) -> str:
    path = Path(torch.__file__).parent / "lib" / _TORCH_NAME
    try:
        parallel_for = ctypes.CDLL(str(path)).torch_parallel_for
    except (OSError, AttributeError):
        return f"one thread only (no torch_parallel_for in {_TORCH_NAME})"
    library.ms_set_parallel_for(ctypes.cast(parallel_for, ctypes.c_void_p))
    return "threads of torch"


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load()[0]


def state() -> str:
    """In words: loaded, and with which threads, or why not."""
    return _load()[1]


def function(name: str, *argtypes: Any) -> Callable[..., int]:
    """A C function that returns int64; ctypes lets other Python threads run during the call."""
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"{name} is not there: {state()}")
    found = getattr(loaded, name)
    found.argtypes, found.restype = argtypes, ctypes.c_int64
    return found


def rows_of(x: Tensor) -> Tensor:
    """x (N, D) with neighbouring features next to each other in memory; a copy where they are not."""
    return x if x.stride(1) == 1 or x.numel() == 0 else x.contiguous()


def rows_bytes(x: Tensor) -> int:
    """What `rows_of` allocates."""
    return 0 if x.stride(1) == 1 or x.numel() == 0 else x.numel() * x.element_size()
