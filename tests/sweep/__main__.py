"""Sweep model types: `python -m tests.sweep [TYPE ...] [--shard 1/4] [--methods bare,wta_crs] [--no-write]`.

Without types, all are swept and the committed results are replaced; with some, theirs are.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import warnings
from typing import Any

import torch
import transformers

from . import table
from .running import run
from .types import model_types


def main() -> int:
    """Sweep, print every failure, and write the results; 1 if anything failed."""
    arguments = _arguments()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    names = arguments.types or model_types()
    if arguments.shard:
        number, count = map(int, arguments.shard.split("/"))
        names = names[number - 1 :: count]
    methods = arguments.methods.split(",") if arguments.methods else None
    found: dict[str, Any] = {}
    for name in names:
        found[name] = run(name, methods)
        print(_line(found[name]), flush=True)
    if not arguments.no_write:
        kept = table.read()["types"] if (arguments.types or arguments.shard) and table.RESULTS.exists() else {}
        table.write(_versions() | {"types": {**kept, **found}})
    return int(any(_failures(row) for row in found.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all of them if none is named")
    parser.add_argument("--shard", help="such as 1/4: the first of four parts")
    parser.add_argument(
        "--methods", help="names of checks, with commas; all of them if not given (use with --no-write)"
    )
    parser.add_argument("--no-write", action="store_true", help="leave the committed results as they are")
    return parser.parse_args()


def _versions() -> dict[str, str]:
    today = datetime.date.today().isoformat()
    return {"transformers": transformers.__version__, "torch": torch.__version__, "date": today}


def _failures(row: dict[str, Any]) -> dict[str, str]:
    return {name: verdict["why"] for name, verdict in row["methods"].items() if verdict["outcome"] == "failed"}


def _line(row: dict[str, Any]) -> str:
    name = row["model_type"]
    if row["skipped"]:
        return f"{name}: skipped: {row['skipped']}"
    failures = _failures(row)
    if failures:
        return f"{name}: FAILED " + "; ".join(f"{method}: {why}" for method, why in failures.items())
    passed = sum(verdict["outcome"] == "passed" for verdict in row["methods"].values())
    return f"{name}: {row['model']}, {passed} passed, kept {row['kept_ratio']}"


if __name__ == "__main__":
    sys.exit(main())
