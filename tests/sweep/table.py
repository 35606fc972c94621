"""The page docs/architectures.md, made from results.json."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
_MARKS = {"passed": "✓", "skipped": "-", "failed": "FAILED"}
Row = Mapping[str, Any]


def read() -> dict[str, Any]:
    """The committed results: versions, a date, and a row for each model type."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def write(data: Mapping[str, Any]) -> None:
    """Write results.json and the page."""
    data = {**data, "types": {n: data["types"][n] for n in sorted(data["types"], key=str.lower)}}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    PAGE.write_text(page(data))


def page(data: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    rows = [data["types"][name] for name in sorted(data["types"], key=str.lower)]
    swept = [row for row in rows if not row["skipped"]]
    parts = [_INTRODUCTION.format(**data), _totals(rows), _METHODS, _by_method(swept), _table(swept)]
    return "\n\n".join([*parts, _skipped_types(rows), _skipped_methods(swept)]) + "\n"


_INTRODUCTION = """# Every architecture of transformers

`make sweep` builds every model type of transformers small, with random weights, feeds it generated inputs, and checks
each method by its guarantee: converted, saved, loaded and restored.
transformers {transformers}, torch {torch}, {date}. This page is generated from `tests/sweep/results.json`."""

_METHODS = """An exact method must give the outputs and all gradients of the plain model, up to 1e-5 of their norms;
more only where the plain model moves as far when its weights are rounded anew, or float64 shows that it is rounding.
Sampled rows must give all gradients but those of the sampled weights; adapters the plain outputs at first, and
gradients for the adapters alone; an approximate method finite ones, and with all keys (sparse_mha) or without streaming
(flash_svd) the same. Restored, bits, classes and config are those of before. After the bare conversion, the stock
class must read what `save_pretrained` writes, bit for bit. Where the default config has dropout, it is checked with
dropout, too."""


def _totals(rows: list[Row]) -> str:
    skipped = sum(bool(row["skipped"]) for row in rows)
    failed = sum(any(v["outcome"] == "failed" for v in row["methods"].values()) for row in rows)
    ratios = sorted(row["kept_ratio"] for row in rows if row["kept_ratio"])
    middle = f"{ratios[len(ratios) // 2]:.2f}x" if ratios else "-"
    return (
        f"**{len(rows)} model types: {len(rows) - skipped - failed} passed, {failed} failed, {skipped} could not be "
        f"checked** ([why](#not-checked)). Of the bytes kept for backward, the bare conversion leaves {middle} in the "
        "median: the models are tiny, so this says where there is something to save, not how much."
    )


def _by_method(swept: list[Row]) -> str:
    lines = ["| method | passed | nothing that it converts, or refused | failed |", "| --- | --- | --- | --- |"]
    for method in _methods(swept):
        outcomes = [row["methods"][method]["outcome"] for row in swept if method in row["methods"]]
        counts = [str(outcomes.count(kind)) for kind in ("passed", "skipped", "failed")]
        lines.append(f"| {method} | {' | '.join(counts)} |")
    return "\n".join(lines)


def _methods(swept: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in swept for name in row["methods"]))


def _table(swept: list[Row]) -> str:
    methods = _methods(swept)
    lines = [
        "## Checked",
        "",
        "✓ passed, - nothing that the method converts, or refused ([why](#methods-that-were-not-applied)). Kept: bytes "
        "kept for backward after the bare conversion, of the plain model's.",
        "",
        f"| model type | class | parameters | kept | {' | '.join(methods)} |",
        f"| --- | --- | --- | --- | {' | '.join('---' for _ in methods)} |",
    ]
    for row in swept:
        marks = [_MARKS[row["methods"].get(m, {"outcome": "skipped"})["outcome"]] for m in methods]
        kept = "-" if row["kept_ratio"] is None else f"{row['kept_ratio']:.2f}x"
        count = f"{row['parameters'] / 1e6:.2f}M"
        lines.append(f"| {row['model_type']} | {row['model']} | {count} | {kept} | {' | '.join(marks)} |")
    return "\n".join(lines)


def _skipped_types(rows: list[Row]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    details: dict[str, str] = {}
    for row in rows:
        if row["skipped"]:
            groups[_kind(row["skipped"])].append(row["model_type"])
            details[row["model_type"]] = row["skipped"]
    lines = ["## Not checked", ""]
    for kind, names in sorted(groups.items(), key=lambda g: -len(g[1])):
        if all(details[name] == kind for name in names):
            lines.append(f"- {kind} ({len(names)}): {', '.join(names)}")
        else:
            lines.append(f"- {kind} ({len(names)}):")
            lines += [f"  - {name}: `{details[name].removeprefix(kind).lstrip(': ')}`" for name in names]
    return "\n".join(lines)


def _kind(reason: str) -> str:
    """The reason without what is special to one type."""
    if reason.startswith("has "):
        return "is too large even when made smaller"
    return reason.partition(": ")[0] if not reason.startswith("is part of") else reason


def _skipped_methods(swept: list[Row]) -> str:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in swept:
        for method, verdict in row["methods"].items():
            if verdict["outcome"] == "skipped":
                groups[method, _short(verdict["why"])].append(row["model_type"])
    lines = ["## Methods that were not applied", ""]
    for (method, reason), names in sorted(groups.items(), key=lambda g: (g[0][0], -len(g[1]))):
        shown = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:12])} and {len(names) - 12} more"
        lines.append(f"- {method}, {reason} ({len(names)}): {shown}")
    return "\n".join(lines)


def _short(reason: str) -> str:
    """A reason without the names of the modules of one model."""
    if reason.startswith("no module that this method converts"):
        inner = re.search(r"cannot be converted \([^:]*: (.*?)\)", reason)
        return f"refused: {_masked(inner[1])}" if inner else "no module that this method converts"
    return _masked(reason)


def _masked(text: str) -> str:
    text = re.sub(r"\w+Config\([^)]*\):?", "", text)
    return re.sub(r"\b\w*(\.\w+)+\b|\d+|\b[A-Z]\w*(Attention|Model|MLP)\b", "...", text)[:110].strip()
