"""Everything that needs a GPU, in one command for a machine that is lent for minutes: `make gpu OUT=DIR`.

    python -m benchmarks.gpu --out DIR [--part tests|bench|tune] [--wheels DIR] [--install]

Needs no network and no virtual environment. Writes into DIR, which must be empty: tests.log, results.json (the cases)
and tune.json (the tiles of the kernels). `python -m benchmarks.take DIR` then puts the figures where the docs find
them. Each part is a process of its own, so that one that crashes does not take the others with it, and has a share of
the time; a part starts nothing that would end too late, and what it left out it says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PARTS = ("tests", "bench", "tune")
# Of the time that is left when a part starts; the last part has all of it.
SHARES = {"tests": 0.4, "bench": 0.75, "tune": 1.0}
BUDGET_S = 500.0
GRACE_S = 35.0  # what has begun may end so much later, then it is killed


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all that ran passed; 1 where something failed. Everything that is written stays either way."""
    start = time.monotonic()
    options = parse_options(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.install and not install(options.wheels):
        return 1
    failed = []
    for number, part in enumerate(options.parts):
        left_s = max(0.0, options.budget_s - (time.monotonic() - start))
        share = 1.0 if number == len(options.parts) - 1 else SHARES[part]
        print(f"\n--- {part}: at most {share * left_s:.0f} s of the {left_s:.0f} s that are left", flush=True)
        if not run_part(part, share * left_s, options):
            failed.append(part)
    taken_s = time.monotonic() - start
    print(f"\n{taken_s:.0f} s in all. {'FAILED: ' + ', '.join(failed) if failed else 'All passed.'}")
    print(f"Now, where the repository is: python -m benchmarks.take {options.out}")
    return 1 if failed else 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Anything that is wrong with it ends the program before anything runs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", required=True, help="a new or empty folder for what is measured")
    parser.add_argument("--part", choices=("all", *PARTS), default="all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, whose figures mean nothing")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="which cases of the part bench (default: all)")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help=f"seconds for all (default: {BUDGET_S:.0f})")
    parser.add_argument("--install", action="store_true", help="install this checkout first, with the wheels")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of peers to install (default: .whl, if there)")
    options = parser.parse_args(arguments)
    if not options.out:
        parser.error("argument --out: no folder was named; expected make gpu OUT=DIR. Nothing was run.")
    options.out = Path(options.out)
    options.parts = PARTS if options.part == "all" else (options.part,)
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"argument --out: {options.out} is not a folder. Nothing was run.")
    if options.out.is_dir() and any(options.out.iterdir()):
        parser.error(f"argument --out: {options.out} is not empty; name a new folder or empty it. Nothing was run.")
    if options.wheels and not list(options.wheels.glob("*.whl")):
        parser.error(f"argument --wheels: there are no wheels (*.whl) in {options.wheels}. Nothing was run.")
    if options.device == "cuda" and not has_cuda():
        parser.error("torch sees no CUDA or ROCm device. Nothing was run. For a dry run: DEVICE=cpu (--device cpu).")
    return options


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def install(wheels: Path | None) -> bool:
    """Install the checkout and the peers, offline. Editable: the checkout stays the only copy of memsave, so that
    nothing can be tested or measured from another one, and its C++ library is built in place."""
    found = sorted((wheels or ROOT / ".whl").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    commands = [[*pip, "--no-build-isolation", "--editable", str(ROOT)]]
    commands += [[*pip, str(wheel)] for wheel in found]
    # Where the system's Python is marked as managed by its packages, this one command is meant all the same.
    environment = os.environ | {"PIP_BREAK_SYSTEM_PACKAGES": "1"}
    for command in commands:
        print(f"installing {command[-1]}", flush=True)
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            print(f"error: this failed: {' '.join(command)}", file=sys.stderr)
            if command is commands[0]:
                return False
    return True


def run_part(part: str, budget_s: float, options: argparse.Namespace) -> bool:
    """Run one part in a process of its own. False where it failed or had to be killed."""
    command = tests_command(options.tiny) if part == "tests" else bench_command(part, budget_s, options)
    settings: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    settings["timeout"] = budget_s + GRACE_S
    try:
        if part == "tests":
            with (options.out / "tests.log").open("w", encoding="utf-8") as log:
                done = subprocess.run(command, stdout=log, stderr=log, **settings)
            print(last_line(options.out / "tests.log"))
        else:
            done = subprocess.run(command, **settings)
    except subprocess.TimeoutExpired:
        print(f"{part}: killed after {budget_s + GRACE_S:.0f} s; what it had written is there", file=sys.stderr)
        return False
    return done.returncode == 0


def tests_command(tiny: bool) -> list[str]:
    where = "tests/triton" if tiny else "tests"
    return [sys.executable, "-m", "pytest", where, "-m", "gpu", "-q", "--durations=10", "-p", "no:cacheprovider"]


def bench_command(part: str, budget_s: float, options: argparse.Namespace) -> list[str]:
    out = options.out.resolve()
    command = [sys.executable, "-m", "benchmarks.run", "--device", options.device, "--budget-s", f"{budget_s:.1f}"]
    if part == "tune":
        command += ["--suite", "tiles", "--bundle", str(out / "tune.json")]
    else:
        command += ["--bundle", str(out / "results.json")]
        command += ["--case", *options.case] if options.case else []
    return [*command, *(["--tiny", "--repeats", "2"] if options.tiny else [])]


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else f"{log} is empty"


if __name__ == "__main__":
    sys.exit(main())
