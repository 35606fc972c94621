"""Runs the C++ kernels over the case table, for a process that has a sanitizer loaded: `sanitized.py LIBRARY [OP ...]`.

No guards lie around the tensors here: the sanitizer must see what is beyond them. It ends the process at what it finds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from memsave.ops import _native
from tests.cases.ops import CASES, cases_of, selected_attention
from tests.cases.ops.inputs import inclusion, log_normal, matrix, row_indices, scales, seed
from tests.cases.ops.selected_attention_backward import with_gradients
from tests.harness import has_kernel, implementation


def must_refuse(launch: Callable[..., Any], *args: Any) -> None:
    try:
        launch(*args)
    except IndexError:
        return
    raise AssertionError(f"{launch.__module__} took {args}")


def run(op: str) -> None:
    """Every row of an op, and what else its kernel must survive."""
    launch = implementation(op, "native")
    for case in cases_of(op):
        launch(*case.make())
    if op == "draw_rows":  # every size of a bucket, and every alignment of the scratch memory
        for n in [*range(2, 40), 1023, 1024, 1025, 16384, 16385]:
            launch(inclusion(n, max(1, n // 3)), max(1, n // 3), seed(n))
        must_refuse(launch, inclusion(10, 2), 9, seed(0))
        launch(torch.full((9,), 2**32), 2, seed(0))  # more marks than k
    if op == "row_inclusion":
        for n in [*range(2, 40), 16384, 16385]:
            launch(log_normal(n), max(1, n // 3))
    if op in ("gather_rows", "sampled_matmul"):
        for outside in (-1, 6, 2**31 - 1, -(2**31)):
            rows = torch.tensor([0, outside], dtype=torch.int32)
            must_refuse(launch, matrix(6, 4), *([matrix(2, 3)] if op == "sampled_matmul" else []), rows, scales(2))
    if op in ("selected_attention", "selected_attention_backward"):
        for wrong in ([2**31 - 1], [-2], [0, 23], [3, 3], [5, -1, 6]):
            args = selected_attention.arguments(keep=len(wrong), fewer=False)
            args[3][0, 0, 5] = torch.tensor(wrong)
            must_refuse(launch, *(args if op == "selected_attention" else with_gradients(lambda args=args: args)))
    if op == "sddmm":
        for tokens in [*range(1, 34), 255, 256, 257, 272]:  # every remainder of a square and of a tile
            launch(matrix(tokens, 33), matrix(tokens, 17), row_indices(33 * 17, 40))
        for wrong in ([0, -1], [0, 24], [-1, 0], [3, 3], [5, 4], [0, 2**31 - 1]):
            must_refuse(launch, matrix(6, 4), matrix(6, 6), torch.tensor(wrong, dtype=torch.int32))
    if op == "spmm":
        for transposed in (False, True):
            for tokens in [*range(1, 34), 127, 128, 129, 144]:  # every remainder of a square and of a tile
                x = matrix(tokens, 17 if transposed else 33)
                launch(x, scales(40), row_indices(33 * 17, 40), 33, 17, transposed)
            for wrong in ([0, -1], [0, 24], [-1, 0], [3, 3], [5, 4], [0, 2**31 - 1]):
                x = matrix(6, 6 if transposed else 4)
                must_refuse(launch, x, scales(2), torch.tensor(wrong, dtype=torch.int32), 4, 6, transposed)


def main(library: str, *ops: str) -> None:
    _native.LIBRARY_PATH = Path(library)
    torch.set_num_threads(2)
    for op in ops or sorted({case.op for case in CASES if has_kernel(case.op, "native")}):
        run(op)
        print(op)


if __name__ == "__main__":
    main(*sys.argv[1:])
