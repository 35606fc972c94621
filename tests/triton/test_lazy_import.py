"""Triton is imported by the first op that needs it, never before, and its absence costs nothing on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> None:
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_ops_does_not_import_triton() -> None:
    run_python("import sys, memsave.ops; assert 'triton' not in sys.modules, 'triton was imported'")


def test_ops_run_without_triton() -> None:
    run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, memsave.ops as ops\n"
        "q = ops.row_inclusion(torch.arange(1.0, 9.0), 3)\n"
        "rows = ops.draw_rows(q, 3, torch.tensor(1))\n"
        "assert ops.gather_rows(torch.ones(8, 2), rows).sum() == 6\n"
    )
