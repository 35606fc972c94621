"""What `memsave.explain` found: tables to read and data to keep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any

from ..memory import MemoryProfile
from ..memory.profile import format_bytes
from ..text import aligned


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that are kept for backward for one cause, in all the model or in one group of modules.

    Attributes:
        cause: why they are kept.
        modules: the modules that keep them, as a pattern; "" for all of the model.
        count: how many modules these are.
        kept_bytes: as the model is.
        converted_bytes: after `memsave.convert_model(model)`; None if that has nothing to convert.
        methods: the methods of that conversion which free some.
    """

    cause: str
    modules: str = ""
    count: int = 0
    kept_bytes: int
    converted_bytes: int | None
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Option:
    """What one change of the model or of the training would do, predicted.

    Attributes:
        change: what is changed; "as it is" for nothing.
        kept_bytes, peak_bytes, phase: as in `MemoryProfile`; None if the step fails with the change.
        problem: why it fails.
    """

    change: str
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    phase: str | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Trap:
    """A known reason for memory that is used in vain, and what to do.

    Attributes:
        name: short.
        text: what was found, with its bytes, and what to do.
        affected_bytes: the bytes that the trap is about.
    """

    name: str
    text: str
    affected_bytes: int


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a training step keeps for backward, why, and what would change it. `print(explanation)` shows tables.

    Attributes:
        model: class of the model.
        causes: bytes kept for backward by cause, largest first; they add up to `profile.saved_bytes`.
        modules: the same by groups of modules and cause.
        options: what changes would do; the first is the model as it is.
        traps: known traps that the model is in, largest first.
        profile: the step as it is, as `memsave.estimate` gives it.
    """

    model: str
    causes: tuple[Kept, ...]
    modules: tuple[Kept, ...]
    options: tuple[Option, ...]
    traps: tuple[Trap, ...]
    profile: MemoryProfile = field(repr=False)

    def table(self, *, modules: int = 12) -> str:
        """The explanation as text; of the groups of modules, the `modules` largest."""
        lines = [f"{self.model} keeps {format_bytes(self.profile.saved_bytes)} for backward, by cause:"]
        lines += aligned([self._row(kept, (kept.cause,)) for kept in self.causes])
        largest, rest = list(self.modules[:modules]), self.modules[modules:]
        if rest:
            largest.append(_total(rest))
        lines += ["by module:"]
        lines += aligned([self._row(kept, (kept.modules, f"x{kept.count}", kept.cause)) for kept in largest])
        lines += ["predicted for the whole step:", *aligned(self._option_rows())]
        lines += [f"at the peak of {format_bytes(self.profile.peak_bytes)}:", *aligned(self._category_rows())]
        lines += ["known traps:" if self.traps else "no known trap was found"]
        for trap in self.traps:
            lines += wrap(f"{trap.name}: {trap.text}", 110, initial_indent="  - ", subsequent_indent="    ")
        return "\n".join(lines)

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """The explanation as plain data."""
        return asdict(self)

    def to_json(self) -> str:
        """The explanation as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _row(self, kept: Kept, names: tuple[str, ...]) -> tuple[str, ...]:
        share = f"{kept.kept_bytes / max(self.profile.saved_bytes, 1):.0%}"
        cells = (*names, format_bytes(kept.kept_bytes), share)
        if kept.converted_bytes is None:
            return cells
        return (*cells, "->", format_bytes(kept.converted_bytes), ", ".join(kept.methods))

    def _option_rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("", "kept for backward", "", "peak", "", "")]
        for option in self.options:
            if option.problem is not None:
                rows.append((option.change, f"fails: {option.problem}", "", "", "", ""))
                continue
            kept = _beside(option.kept_bytes, self.options[0].kept_bytes)
            rows.append(
                (option.change, *kept, *_beside(option.peak_bytes, self.options[0].peak_bytes), f"in {option.phase}")
            )
        return rows

    def _category_rows(self) -> list[tuple[str, ...]]:
        peak = max(self.profile.peak_bytes, 1)
        sizes = self.profile.by_category.items()
        return [(name, format_bytes(size), f"{size / peak:.0%}") for name, size in sizes if size]


def _beside(size: int | None, before: int | None) -> tuple[str, str]:
    """A number of bytes, and its ratio to another."""
    return format_bytes(size or 0), f"{(size or 0) / max(before or 0, 1):.2f}x"


def _total(rows: Sequence[Kept]) -> Kept:
    converted = [row.converted_bytes for row in rows]
    return Kept(
        cause="",
        modules="(other modules)",
        count=sum(row.count for row in rows),
        kept_bytes=sum(row.kept_bytes for row in rows),
        converted_bytes=None if None in converted else sum(size or 0 for size in converted),
    )
