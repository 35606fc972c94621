"""Takes what `make gpu OUT=DIR` wrote: `python -m benchmarks.take DIR` files it in benchmarks/results/<device>/.

Then `python -m benchmarks.tables` fills in the docs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import result_files
from benchmarks.result_files import RESULTS, ResultError

BUNDLES = ("results.json", "tune.json")


def take(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Files every result of a folder; all of them or, with an error, none.

    Raises:
        ResultError: no result in the folder, one of another format, or one of a dry run.
    """
    bundles = [folder / name for name in BUNDLES if (folder / name).exists()]
    if not bundles:
        raise ResultError(f"{folder}: neither {' nor '.join(BUNDLES)} in it. Name the folder that `make gpu` wrote.")
    found = {}
    for bundle in bundles:
        for name, data in result_files.read_bundle(bundle).items():
            if data["tiny"]:
                raise ResultError(f"{bundle}, {name}: from a dry run at toy size, whose figures mean nothing.")
            found[results / result_files.slug(data["machine"]["device"]) / f"{name}.json"] = data
    if not found:
        raise ResultError(
            f"{folder}: no result in {' or '.join(b.name for b in bundles)}; what was left out is told there."
        )
    for path, data in found.items():
        result_files.write(path, data)
    return list(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="what `make gpu OUT=` was given")
    options = parser.parse_args(arguments)
    try:
        taken = take(options.folder)
    except ResultError as error:
        print(f"error: {error} Nothing was taken.", file=sys.stderr)
        return 2
    print(*taken, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
