"""`python -m memsave`: what is installed and which backend serves each op, to paste into a report.

`python -m memsave estimate | explain | convert MODEL` asks about a transformers model from its config; see commands.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import commands
from .environment import as_text, collect
from .errors import MemsaveError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one subcommand, or print the report on the installation."""
    parser = argparse.ArgumentParser(
        prog="python -m memsave",
        description="Report versions, devices and backends; or, with a subcommand, ask about a transformers model.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    commands.add_to(parser.add_subparsers(dest="command", metavar="{estimate,explain,convert}"))
    options = parser.parse_args(arguments)
    if options.command is None:
        report = collect()
        print(json.dumps(report, indent=2) if options.json else as_text(report))
        return
    try:
        print(options.run(options))
    except (MemsaveError, ValueError, ImportError) as error:
        sys.exit(f"memsave {options.command}: {error}")


if __name__ == "__main__":
    main()
