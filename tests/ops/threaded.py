"""Runs the C++ kernels in several Python threads at once, for a process that has a sanitizer loaded.

`threaded.py LIBRARY ROUNDS [OP ...]`. The threads read the same tensors, each call writes to its own; every call is
divided over further threads by tests/ops/parallel_for.cpp, which the library contains.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memsave.ops import _native
from tests.cases.ops import CASES, SPECS, cases_of, one_dtype
from tests.harness import OpCase, has_kernel, implementation

THREADS = 3


def lend_threads(library: ctypes.CDLL) -> str:
    library.ms_set_parallel_for(ctypes.cast(library.test_parallel_for, ctypes.c_void_p))
    return "threads of the test"


def calls(op: str) -> list[OpCase]:
    """Rows of different shapes, among them the large ones, whose work is divided."""
    kinds = one_dtype(case for case in cases_of(op) if "beyond" not in case.name)
    return [case for case in kinds if case.large][:4] + [case for case in kinds if not case.large][:4]


def run(op: str, rounds: int, pool: ThreadPoolExecutor) -> None:
    launch, writes = implementation(op, "native"), SPECS[op].writes
    rows = [case.make() for case in calls(op)]

    def work(thread: int) -> None:
        for i in range(rounds * len(rows)):
            args = rows[(i + thread * (i % 2)) % len(rows)]  # now the same row in all threads, now others
            launch(*(_own(a) if place in writes else a for place, a in enumerate(args)))

    list(pool.map(work, range(THREADS)))


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def main(library: str, rounds: str, *ops: str) -> None:
    _native.LIBRARY_PATH = Path(library)
    _native._lend_threads = lend_threads
    torch.set_num_threads(1)
    with ThreadPoolExecutor(THREADS) as pool:
        for op in ops or sorted({case.op for case in CASES if has_kernel(case.op, "native")}):
            run(op, int(rounds), pool)
            print(op, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
