"""How figures are written in the tables."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

MIB = 2**20


def mebibytes(row: dict[str, Any], first: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "not counted"
    return f"{row[name] / MIB:.1f} MiB ({row[name] / first[name]:.2f}x)"


def spread(values: Sequence[float], style: str, unit: str = "") -> str:
    """ "2.50x (2.00 to 3.00)": the mean, and the range."""
    return f"{statistics.fmean(values):{style}}{unit} ({min(values):{style}} to {max(values):{style}})"


def by_size(data: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The rows of an op case, those of one size together, the first contender first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in data["results"]:
        found.setdefault(in_words(row["size"]), []).append(row)
    return list(found.values())


def in_words(size: dict[str, Any]) -> str:
    """ "N = 4096, float32"."""
    return ", ".join(value if name == "dtype" else f"{name} = {value}" for name, value in size.items())


def in_bytes(count: int) -> str:
    if count >= 0.1 * MIB:
        return f"{count / MIB:.1f} MiB"
    return f"{count / 1024:.1f} KiB" if count >= 1024 else f"{count} B"


def seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"
