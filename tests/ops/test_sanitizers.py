"""The C++ kernels, compiled with the address and undefined-behaviour sanitizers, over the case table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

CHILD = """
import sys
from pathlib import Path
from memsave.ops import _native
_native.LIBRARY_PATH = Path(sys.argv[1])
import torch
from memsave import ops
from tests.cases.ops import cases_of, inclusion, log_normal, matrix, scales, seed
torch.set_num_threads(2)
with ops.use_backend("native"):
    for case in cases_of("row_inclusion", "draw_rows", "gather_rows"):
        getattr(ops, case.op)(*case.make())
    for n in [*range(2, 40), 1023, 1024, 1025, 16384, 16385]:
        ops.draw_rows(ops.row_inclusion(log_normal(n), max(1, n // 3)), max(1, n // 3), seed(n))
    try:
        ops.gather_rows(matrix(6, 4), torch.tensor([0, 6], dtype=torch.int32), scales(2))
    except IndexError:
        print("done")
"""


def runtime_of(compiler: str, name: str) -> str | None:
    """The path of a runtime library of the compiler, or None."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.mark.slow
def test_kernels_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    runtimes = [runtime_of(compiler, name) for name in ("libasan.so", "libstdc++.so")] if compiler else [None]
    if compiler is None or None in runtimes or not (ROOT / "csrc").exists():
        pytest.skip("needs g++ with libasan on Linux, and csrc/")
    library = tmp_path / "sanitized.so"
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined"]
    sources = [str(path) for path in sorted((ROOT / "csrc").glob("*.cpp"))]
    command = [compiler, *flags, "-fno-sanitize-recover=all", "-shared", "-fPIC", *sources, "-o", str(library)]
    subprocess.run(command, check=True)
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path for path in runtimes if path),
        "ASAN_OPTIONS": "detect_leaks=0",  # torch and Python leave memory to the end of the process
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(library)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "done\n", done.stderr[-3000:]
