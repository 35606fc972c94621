"""Tables and names as text: columns in line, and many module names as one pattern."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from os.path import commonprefix
from typing import Any


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of equally many cells as lines, two spaces in, with the cells of a column one below the other."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def pattern(names: Sequence[str]) -> str:
    """One short pattern for names that differ in numbers and in the last part: `layers.{0-3,7}.mlp.{up,down}_proj`."""
    if set(names) == {""}:
        return "(the model)"
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(collapsed(list(dict.fromkeys(column))) for column in columns)


def collapsed(parts: list[str]) -> str:
    """Different words as one: `{up,down}_proj`; numbers as ranges: `{0-3,7}`."""
    if len(parts) == 1:
        return parts[0]
    if not all(map(_is_number, parts)):
        head, tail = commonprefix(parts), commonprefix([part[::-1] for part in parts])[::-1]
        tail = tail[max(0, len(head) + len(tail) - min(map(len, parts))) :]
        return head + "{" + ",".join(part[len(head) : len(part) - len(tail)] for part in parts) + "}" + tail
    runs: list[list[int]] = []
    for n in sorted(map(int, parts)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"


def _is_number(part: str) -> bool:
    """Whether `part` is a number as PyTorch writes one: not "007", and not in the digits of other scripts."""
    return part.isdecimal() and part.isascii() and part == str(int(part))


def groups(names: Iterable[tuple[Hashable, str]]) -> Iterator[tuple[Any, list[str]]]:
    """Group (key, qualified name) pairs by key and shape of the name; join groups that differ in the last part only."""
    by_shape: dict[tuple[Any, str], list[str]] = {}
    for key, name in names:
        shape = ".".join("#" if _is_number(part) else part for part in name.split("."))
        by_shape.setdefault((key, shape), []).append(name)
    joined: dict[tuple[Any, tuple[str, ...]], list[str]] = {}
    for (key, _), found in by_shape.items():
        joined.setdefault((key, tuple(name.rpartition(".")[0] for name in found)), []).extend(found)
    for (key, _), found in joined.items():
        yield key, found
