"""Times the C++ kernels against plain PyTorch on the CPU: `python benchmarks/ops.py [--json PATH] [--quick]`.

Each case is checked first (same bits as plain PyTorch), and no time is printed for one that fails. The two backends
take turns, so that noise of the machine hits both alike; the time is the median over the turns.

N rows, D features, k = 0.3 N kept rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from memsave import ops

ROWS = (256, 4096, 65536)
FEATURES = (64, 1024, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KEEP_RATIO = 0.3
MAX_INPUT_BYTES = 1 << 30


@dataclass(frozen=True)
class Result:
    """Median seconds of one call; `speedup` is the time of plain PyTorch over that of the kernel."""

    case: str
    threads: int
    reference_s: float
    native_s: float

    @property
    def speedup(self) -> float:
        return self.reference_s / self.native_s


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], Tensor]


def cases(quick: bool) -> Iterator[Case]:
    for n in ROWS[:2] if quick else ROWS:
        yield _draw_case(n)
        for d in FEATURES[:2] if quick else FEATURES:
            for dtype in DTYPES:
                if n * d * dtype.itemsize <= MAX_INPUT_BYTES:
                    yield _gather_case(n, d, dtype)


def _draw_case(n: int) -> Case:
    k = int(KEEP_RATIO * n)
    weights, seed = torch.randn(n).exp(), torch.tensor(n)
    return Case(f"row_inclusion + draw_rows N={n}", lambda: ops.draw_rows(ops.row_inclusion(weights, k), k, seed))


def _gather_case(n: int, d: int, dtype: torch.dtype) -> Case:
    k = int(KEEP_RATIO * n)
    x = torch.randn(n, d).to(dtype)
    rows = torch.randperm(n)[:k].sort().values.to(torch.int32)
    scale = torch.rand(k) + 0.5
    name = f"gather_rows N={n} D={d} {str(dtype).removeprefix('torch.')}"
    return Case(name, lambda: ops.gather_rows(x, rows, scale))


def _timed(call: Callable[[], Tensor], backend: str, repeats: int) -> float:
    with ops.use_backend(backend):
        call()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


def measure(case: Case, threads: int, seconds: float) -> Result:
    """Raises ValueError where the kernel does not give the bits of plain PyTorch."""
    with ops.use_reference():
        expected = case.call()
    if not torch.equal(case.call(), expected):
        raise ValueError(f"{case.name}: the kernel and plain PyTorch differ, so no time is given.")
    once = max(_timed(case.call, "reference", 1), 1e-6)
    repeats, turns = max(1, int(seconds / 10 / once)), 5
    times: dict[str, list[float]] = {"reference": [], "native": []}
    for _ in range(turns):
        for backend, found in times.items():
            found.append(_timed(case.call, backend, repeats))
    return Result(case.name, threads, statistics.median(times["reference"]), statistics.median(times["native"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="leave out the large sizes")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each case, about")
    options = parser.parse_args()

    results = []
    print(f"{'case':46} {'threads':>7} {'PyTorch':>12} {'C++':>12} {'speedup':>8}")
    for case in cases(options.quick):
        for threads in options.threads:
            torch.set_num_threads(threads)
            result = measure(case, threads, options.seconds)
            results.append(result)
            reference, native = f"{result.reference_s * 1e6:.1f} us", f"{result.native_s * 1e6:.1f} us"
            print(f"{case.name:46} {threads:7} {reference:>12} {native:>12} {result.speedup:7.2f}x")
    if options.json:
        figures = [asdict(result) | {"speedup": result.speedup} for result in results]
        machine = {"machine": platform.machine(), "torch": torch.__version__, "cpu_count": os.cpu_count()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "results": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
