"""The result of a measurement: where the bytes are at the peak, and how they got there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

CATEGORIES = ("weights", "gradients", "optimizer", "kept for backward", "temporary", "input")
PHASES = ("forward", "backward", "optimizer", "other")


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Live bytes over time. All lists have the same length; a long run is thinned, never by its peak.

    Attributes:
        event: number of the event (one storage allocated, freed, resized, kept or released) after which the bytes are
            given; increasing, 0 is the start.
        phase: the phase then, one of `PHASES`.
        live_bytes: for each of `CATEGORIES`, the live bytes then.
    """

    event: list[int]
    phase: list[str]
    live_bytes: dict[str, list[int]]

    def total_bytes(self) -> list[int]:
        """Live bytes of all categories together, one number per event."""
        return [sum(parts) for parts in zip(*self.live_bytes.values(), strict=True)]


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """Memory of one run, in bytes, all devices added up. Made by `memsave.measure` and `memsave.estimate`.

    Attributes:
        peak_bytes: the largest sum of all live storages at one moment. Those that existed before are included if the
            function touched them or they belong to a module or an optimizer that ran.
        baseline_bytes: the same sum at the start.
        saved_bytes: the largest number of bytes kept for backward at one moment, as `memsave.saved_bytes` counts them.
        by_category: the peak by `CATEGORIES`; adds up to `peak_bytes`. A storage that fits several goes to the first.
            "input" is what existed before and is nothing else; "temporary" is the rest of what the function allocated,
            with the bytes that memsave's own ops use inside.
        by_module: the peak by the innermost module that was running when the storage was allocated, or whose backward
            was; in parentheses, what no module allocated. Adds up to `peak_bytes`; largest first.
        phase: when the peak was, one of `PHASES`: inside `backward`, inside an optimizer's `step`, "forward" for
            the rest while gradients are enabled or a module runs, else "other".
        timeline: live bytes over time.
        allocator_peak_bytes: on CUDA, the peak of torch's allocator on all devices minus what it held at the start: to
            compare with `peak_bytes - baseline_bytes`. None without CUDA.
        recomputed_modules: the outermost modules whose forward ran again in backward, by activation checkpointing: what
            they keep then is not in `saved_bytes`.
    """

    peak_bytes: int
    baseline_bytes: int
    saved_bytes: int
    by_category: dict[str, int]
    by_module: dict[str, int]
    phase: str
    timeline: Timeline = field(repr=False)
    allocator_peak_bytes: int | None = None
    recomputed_modules: list[str] = field(default_factory=list)

    def table(self, *, modules: int = 10) -> str:
        """The profile as aligned text: totals, the peak by category, and the `modules` largest modules."""
        rows: list[tuple[str, int | None, str]] = [
            ("peak", self.peak_bytes, f"in {self.phase}"),
            ("at the start", self.baseline_bytes, ""),
            ("most kept for backward", self.saved_bytes, ""),
        ]
        if self.allocator_peak_bytes is not None:
            rows.append(("CUDA allocator, above the start", self.allocator_peak_bytes, ""))
        largest = list(self.by_module.items())
        others_bytes = sum(size for _, size in largest[modules:])
        largest = largest[:modules] + ([("(other modules)", others_bytes)] if others_bytes else [])
        rows += [("\nat the peak, by category", None, ""), *self._shares(self.by_category.items())]
        rows += [("\nat the peak, by module", None, ""), *self._shares(largest)]
        width = max(len(name) for name, size, _ in rows if size is not None)
        return "\n".join(
            name if size is None else f"{name:<{width}}  {format_bytes(size):>10}  {note}".rstrip()
            for name, size, note in rows
        )

    def _shares(self, sizes: Iterable[tuple[str, int]]) -> list[tuple[str, int, str]]:
        return [(f"  {name}", size, f"{100 * size / max(self.peak_bytes, 1):5.1f}%") for name, size in sizes]

    __str__ = table

    def to_json(self) -> str:
        """The profile as JSON text; `from_json` gives an equal profile back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MemoryProfile:
        """The profile that `to_json` wrote. Raises ValueError if `text` is not one."""
        try:
            fields: dict[str, Any] = json.loads(text)
            return cls(**{**fields, "timeline": Timeline(**fields["timeline"])})
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"expected the text that MemoryProfile.to_json() returns, got {text[:80]!r}") from error

    def plot(self, path: str | PathLike[str], *others: MemoryProfile, labels: list[str] | None = None) -> Path:
        """Draw the timeline as stacked areas, with the total of each of `others` as a line, and write it to `path`.

        Args:
            path: image file; the suffix gives the format (`.png`, `.svg`, ...).
            others: profiles to compare with.
            labels: one name for this profile and each of `others`.

        Raises:
            ImportError: without matplotlib (the extra `plot`).
            ValueError: if `labels` has the wrong length.
        """
        from .plot import plot_profiles

        return plot_profiles(path, [self, *others], labels)


def format_bytes(size_bytes: float) -> str:
    """A number of bytes in the largest binary unit that keeps it above one: `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
