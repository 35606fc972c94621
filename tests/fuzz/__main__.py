"""Fuzzes until the time is over: `python -m tests.fuzz [--seconds 300] [--seed N] [--only ops,files]`.

Part after part is run by pytest with a new seed. A failure ends it with the input and how to see it again; the database
of Hypothesis (.hypothesis/) has it, too, so that the next run begins with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from random import SystemRandom

from .examples import FACTOR

PARTS = {
    "ops": ("5", "tests/fuzz/test_ops.py"),
    "configs": ("5", "tests/fuzz/test_configs.py"),
    "json": ("5", "tests/fuzz/test_json.py"),
    "files": ("3", "tests/fuzz/test_files.py"),
    "trees": ("5", "tests/fuzz/test_trees.py"),
    "threads": ("3", "tests/ops/test_sanitizers.py", "-k", "threads"),
    "endurance": ("1", "tests/test_endurance.py"),
}
"""How many times the examples of `make test`, and what pytest is given."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="no part begins later than that (default: 300)")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(2**31), help="of the first part")
    parser.add_argument("--only", default=",".join(PARTS), help=f"which of {','.join(PARTS)}")
    settings = parser.parse_args()
    end = time.monotonic() + settings.seconds
    for number, part in enumerate(cycle(settings.only.split(","))):
        if time.monotonic() > end:
            return 0
        seed, (factor, *args) = settings.seed + number, PARTS[part]
        print(f"\n{part}: {FACTOR}={factor} python -m pytest {' '.join(args)} --hypothesis-seed={seed}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-x", *args, f"--hypothesis-seed={seed}"]
        variables = {**os.environ, FACTOR: factor, "OMP_NUM_THREADS": "1"}
        if status := subprocess.run(command, cwd=Path(__file__).parents[2], env=variables).returncode:
            print(f"\n{part} failed with seed {seed}; the line above runs the same examples again.")
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
