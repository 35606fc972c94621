"""Runs `tests/triton/interpreted` in processes of their own: kernels are interpreted or compiled, never both in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[2]


CHOOSING = "pq_ or selected_"
PARTS = [  # of about equal length, so that several workers may share them
    ("test_kernels.py", ""),
    ("test_mutants.py", CHOOSING),
    ("test_mutants.py", f"not ({CHOOSING})"),
]


@pytest.mark.parametrize(("tests", "chosen"), PARTS)
def test_in_the_interpreter(tests: str, chosen: str) -> None:
    triton = pytest.importorskip("triton", reason="the triton package is not installed")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("the interpreter of triton 3.6 fails on numpy 2.4 and later, where 0-d arrays are strict")
    # Options and workers of this run are not those of the other.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", f"tests/triton/interpreted/{tests}", "-q", "-p", "no:cacheprovider"]
    command += ["-k", chosen] if chosen else []
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    output = run.stdout + run.stderr
    assert run.returncode == 0, output
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output
