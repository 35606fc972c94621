"""Writes the tables of the docs from the result files: `python -m benchmarks.tables`.

In a page, `<!-- results: cpu/NAME -->` is followed by the table of benchmarks/results/cpu/NAME.json, up to
`<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"<!-- results: (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, results: Path = ROOT / "benchmarks" / "results") -> str:
    """The text of a page with every table as its result file has it."""

    def fill(block: re.Match[str]) -> str:
        data = json.loads((results / f"{block['file']}.json").read_text(encoding="utf-8"))
        return f"<!-- results: {block['file']} -->\n{table(data)}\n<!-- end -->"

    return _BLOCK.sub(fill, page)


def table(data: dict[str, Any]) -> str:
    """The Markdown table of one result file, and where it was measured."""
    rows = variance_rows(data["results"]) if "draws" in data["case"] else training_rows(data["results"])
    header, *body = rows
    lines = [" | ".join(cells) for cells in (header, ["---"] * len(header), *body)]
    made = data["machine"]
    threads = f"{made['threads']} thread" + ("s" if made["threads"] > 1 else "")
    setting = f"{data['case']['title']}. "
    if "shape" in data["case"]:
        batch, length, width = data["case"]["shape"]
        setting += f"{batch} x {length} tokens, d = {width}. "
    footnote = f"{setting}{made['cpu']}, {threads}, torch {made['versions']['torch']}, {made['date']}."
    return "\n".join([*(f"| {line} |" for line in lines), "", footnote])


def training_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    plain = results[0]
    rows = [["variant", "kept for backward", "peak", "step", "CPU time"]]
    for r in results:
        kept = "not counted"
        if r["kept_bytes"] is not None:
            kept = f"{r['kept_bytes'] / 2**20:.1f} MiB ({r['kept_bytes'] / plain['kept_bytes']:.2f}x)"
        peak = f"{r['peak_bytes'] / 2**20:.1f} MiB ({r['peak_bytes'] / plain['peak_bytes']:.2f}x)"
        step = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / plain['median_s']:.2f}x)"
        rows.append([r["variant"], kept, peak, step, f"{r['cpu_s'] / plain['cpu_s']:.2f}x"])
    return rows


def variance_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = [["sigma", "keep_ratio", "pps", "wta_crs", "crs", "pps / wta_crs", "pps / crs"]]
    for r in results:
        pps, wta_crs, crs = r["pps"], r["wta_crs"], r["crs"]
        ratios = [f"{pps / wta_crs:.2f}", f"{pps / crs:.2f}"]
        rows.append([str(r["sigma"]), str(r["keep_ratio"]), f"{pps:.3g}", f"{wta_crs:.3g}", f"{crs:.3g}", *ratios])
    return rows


def main() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
