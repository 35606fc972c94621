"""From the events of a run to its profile.

What a storage is for is often known only later (a gradient is a temporary until it becomes `.grad`), so the tracker
writes down what happens to which storage, and the categories are read off at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from .profile import CATEGORIES, MemoryProfile, Timeline
from .storages import Record

_MAX_POINTS = 2000


class Event(NamedTuple):
    """One change: `change_bytes` of live memory and `change_handles` saved-tensor handles on one storage."""

    record: Record
    change_bytes: int
    change_handles: int
    phase: str


class Point(NamedTuple):
    """Live bytes by category after event number `event`."""

    event: int
    phase: str
    live_bytes: tuple[int, ...]


def build_profile(
    existing: Iterable[tuple[Record, int]],
    events: list[Event],
    allocator_peak_bytes: int | None,
    recomputed: Iterable[str] = (),
) -> MemoryProfile:
    """The profile of a run.

    Args:
        existing: the storages that existed before, each with its size at the start.
        events: what happened, in order.
        allocator_peak_bytes, recomputed: passed on.
    """
    existing = [(record, size) for record, size in existing if record.counted]
    events = [event for event in events if event.record.counted]
    points, saved_bytes = _replay(existing, events)
    peak = max(points, key=lambda point: sum(point.live_bytes))

    by_module: Counter[str] = Counter()
    for record, size in existing:
        by_module[record.module] += size
    for event in events[: peak.event]:
        by_module[event.record.module] += event.change_bytes
    return MemoryProfile(
        peak_bytes=sum(peak.live_bytes),
        baseline_bytes=sum(points[0].live_bytes),
        saved_bytes=saved_bytes,
        by_category=dict(zip(CATEGORIES, peak.live_bytes, strict=True)),
        by_module={name: size for name, size in by_module.most_common() if size},
        phase=peak.phase,
        timeline=_timeline(_thin(points)),
        allocator_peak_bytes=allocator_peak_bytes,
        recomputed_modules=list(dict.fromkeys(recomputed)),
    )


def _replay(existing: list[tuple[Record, int]], events: list[Event]) -> tuple[list[Point], int]:
    """Live bytes by category at the start and after each event, and the most that was kept for backward at once."""
    live: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    sizes: Counter[Record] = Counter()
    handles: Counter[Record] = Counter()
    for record, size in existing:
        sizes[record] = size
        live[_category(record, kept=False)] += size
    points = [Point(0, events[0].phase if events else "other", tuple(live.values()))]
    kept_bytes = saved_bytes = 0
    for number, (record, change_bytes, change_handles, phase) in enumerate(events, start=1):
        was_kept, size = handles[record] > 0, sizes[record]
        live[_category(record, was_kept)] -= size
        sizes[record] += change_bytes
        handles[record] += change_handles
        kept = handles[record] > 0
        live[_category(record, kept)] += sizes[record]
        if record.role != "weights":
            kept_bytes += sizes[record] * kept - size * was_kept
            saved_bytes = max(saved_bytes, kept_bytes)
        points.append(Point(number, phase, tuple(live.values())))
    return points, saved_bytes


def _category(record: Record, kept: bool) -> str:
    if record.role:
        return record.role
    if kept:
        return "kept for backward"
    return "input" if record.existed else "temporary"


def _thin(points: list[Point]) -> list[Point]:
    """At most about `_MAX_POINTS` points: the first, the last, and the largest of each run of equal length."""
    length = -(-len(points) // _MAX_POINTS)
    if length == 1:
        return points
    between = points[1:-1]
    runs = [between[start : start + length] for start in range(0, len(between), length)]
    return [points[0], *(max(run, key=lambda point: sum(point.live_bytes)) for run in runs), points[-1]]


def _timeline(points: list[Point]) -> Timeline:
    columns = zip(*(point.live_bytes for point in points), strict=True)
    return Timeline(
        event=[point.event for point in points],
        phase=[point.phase for point in points],
        live_bytes=dict(zip(CATEGORIES, map(list, columns), strict=True)),
    )
