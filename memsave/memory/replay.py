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


# A storage that existed before the run, with its bytes at the start.
Existing = tuple[Record, int]


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
    existing, events = counted(existing, events)
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


def counted(existing: Iterable[tuple[Record, int]], events: Iterable[Event]) -> tuple[list[Existing], list[Event]]:
    """Those of a tracker's storages and events that belong to what is measured."""
    return [e for e in existing if e[0].counted], [event for event in events if event.record.counted]


class State:
    """Which storages are live and which are kept for backward, event after event.

    Attributes:
        sizes: bytes of each storage.
        handles: saved-tensor handles on each storage.
        live_bytes: live bytes by category.
        kept_bytes: bytes kept for backward; weights are not counted.
    """

    def __init__(self, existing: Iterable[Existing]) -> None:
        self.sizes: Counter[Record] = Counter()
        self.handles: Counter[Record] = Counter()
        self.live_bytes: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.kept_bytes = 0
        for record, size in existing:
            self.sizes[record] = size
            self.live_bytes[category_of(record, kept=False)] += size

    def apply(self, event: Event) -> None:
        record = event.record
        was_kept, size = self.handles[record] > 0, self.sizes[record]
        self.live_bytes[category_of(record, was_kept)] -= size
        self.sizes[record] += event.change_bytes
        self.handles[record] += event.change_handles
        kept = self.handles[record] > 0
        self.live_bytes[category_of(record, kept)] += self.sizes[record]
        if record.role != "weights":
            self.kept_bytes += self.sizes[record] * kept - size * was_kept


def _replay(existing: list[Existing], events: list[Event]) -> tuple[list[Point], int]:
    """Live bytes by category at the start and after each event, and the most that was kept for backward at once."""
    state = State(existing)
    points = [Point(0, events[0].phase if events else "other", tuple(state.live_bytes.values()))]
    saved_bytes = 0
    for number, event in enumerate(events, start=1):
        state.apply(event)
        saved_bytes = max(saved_bytes, state.kept_bytes)
        points.append(Point(number, event.phase, tuple(state.live_bytes.values())))
    return points, saved_bytes


def category_of(record: Record, kept: bool) -> str:
    """Which of `CATEGORIES` a storage is in, as far as is known; `kept`: whether it is kept for backward."""
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
