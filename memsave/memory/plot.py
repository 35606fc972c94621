"""Drawing a profile: live bytes over time, by category."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .profile import CATEGORIES, MemoryProfile, Timeline, format_bytes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = dict(zip(CATEGORIES, ("#0072B2", "#56B4E9", "#999999", "#E69F00", "#F0E442", "#009E73"), strict=True))
_LINES = ("#000000", "#D55E00", "#CC79A7", "#005F43", "#5B3A8C", "#7F7F00")


def plot_profiles(path: str | PathLike[str], profiles: Sequence[MemoryProfile], labels: Sequence[str] | None) -> Path:
    """Draw the first profile as stacked areas and the totals of the others over it; see `MemoryProfile.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib, which is missing: pip install 'memsave[plot]'") from error
    if labels is None:
        labels = [f"run {number}" for number in range(1, len(profiles) + 1)]
    if len(labels) != len(profiles):
        raise ValueError(f"expected {len(profiles)} labels, one for each profile, got {len(labels)}: {list(labels)}")

    largest_bytes = max(profile.peak_bytes for profile in profiles)
    unit, unit_bytes = _unit(largest_bytes)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    axes = figure.add_subplot()
    first = profiles[0]
    if len(profiles) == 1:
        _draw_areas(axes, first, unit_bytes, alpha=1.0)
        axes.set_title(f"Live memory: peak {format_bytes(first.peak_bytes)} in {first.phase}", fontsize=14)
    else:
        _draw_areas(axes, first, unit_bytes, alpha=0.5)
        lines = _draw_totals(axes, profiles, labels, unit_bytes)
        figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=11, frameon=False)
        axes.set_title(f"Live memory (areas: {labels[0]})", fontsize=14)
    axes.set_xlabel("progress (% of memory events)", fontsize=12)
    axes.set_ylabel(f"live memory ({unit})", fontsize=12)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.12 * largest_bytes / unit_bytes or 1)
    axes.tick_params(labelsize=11)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_totals(axes: Any, profiles: Sequence[MemoryProfile], labels: Sequence[str], unit_bytes: int) -> list[Any]:
    lines = []
    for number, (profile, label) in enumerate(zip(profiles, labels, strict=True)):
        progress = _progress(profile.timeline)
        total = [size / unit_bytes for size in profile.timeline.total_bytes()]
        name = f"{label}: peak {format_bytes(profile.peak_bytes)} in {profile.phase}"
        color = _LINES[number % len(_LINES)]
        lines += axes.step(progress, total, where="post", color=color, linewidth=1.8, label=name)
    return lines


def _draw_areas(axes: Any, profile: MemoryProfile, unit_bytes: int, alpha: float) -> None:
    timeline, progress = profile.timeline, _progress(profile.timeline)
    layers = [[size / unit_bytes for size in timeline.live_bytes[name]] for name in CATEGORIES]
    colors = [_COLORS[name] for name in CATEGORIES]
    areas = axes.stackplot(progress, layers, labels=CATEGORIES, colors=colors, step="post", linewidth=0, alpha=alpha)
    # The legend lists the areas as they lie, the top one first.
    axes.legend(handles=areas[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=11, frameon=False)
    _mark_phases(axes, timeline, progress)


def _mark_phases(axes: Any, timeline: Timeline, progress: list[float]) -> None:
    top = axes.get_xaxis_transform()  # x in data, y in parts of the axes
    start = 0
    for index in range(1, len(progress) + 1):
        if index < len(progress) and timeline.phase[index] == timeline.phase[start]:
            continue
        end = min(index, len(progress) - 1)
        if progress[end] - progress[start] > 6:  # wide enough for its name
            middle = (progress[start] + progress[end]) / 2
            axes.text(middle, 0.985, timeline.phase[start], transform=top, ha="center", va="top", fontsize=11)
            axes.axvline(progress[end], color="#444444", linewidth=0.8, linestyle=":")
        start = index


def _progress(timeline: Timeline) -> list[float]:
    last = max(timeline.event[-1], 1)
    return [100 * event / last for event in timeline.event]


def _unit(largest_bytes: int) -> tuple[str, int]:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest_bytes >= 1024**power:
            return unit, 1024**power
    return "B", 1
