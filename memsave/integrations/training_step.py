"""Where the memory of one training step is, when the step is run by a loop that is not ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..memory.profile import MemoryProfile, format_bytes
from ..memory.replay import build_profile
from ..memory.tracker import StorageTracker
from ..text import aligned

PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """The memory of one training step, in bytes.

    Attributes:
        step: which optimizer step, from 1 on.
        phase_peak_bytes: the largest sum of all live storages within each of `PHASES`. With accumulated batches there
            are several forwards and backwards, and these are the largest of all.
        profile: the whole step; `profile.saved_bytes` is what was kept for backward at most.
    """

    step: int
    phase_peak_bytes: dict[str, int]
    profile: MemoryProfile

    def to_log(self) -> dict[str, int]:
        """The bytes, by names that are fit for a log."""
        peaks = {f"memsave_{phase}_peak_bytes": size for phase, size in self.phase_peak_bytes.items()}
        return {"memsave_peak_bytes": self.profile.peak_bytes, **peaks, "memsave_kept_bytes": self.profile.saved_bytes}

    def __str__(self) -> str:
        rows = [(f"peak in {phase}", format_bytes(size)) for phase, size in self.phase_peak_bytes.items()]
        rows.append(("kept for backward", format_bytes(self.profile.saved_bytes)))
        lines = [f"memsave: memory of training step {self.step}", *aligned(rows)]
        if again := len(self.profile.recomputed_modules):
            lines.append(
                f"activation checkpointing is on: {again} modules ran again in backward; what they kept then is in the "
                "peak of backward alone"
            )
        return "\n".join(lines)


class StepMeter:
    """Follows what happens between `start` and `stop`; `mark` is called before and after the optimizer's step.

    An exception in between leaves it running, since nobody tells it: `end_all` ends it, which every Trainer with the
    callback does when it is made and when it begins to train.
    """

    _running: ClassVar[StepMeter | None] = None

    def __init__(self) -> None:
        self._tracker: StorageTracker | None = None
        self._marks: list[int] = []

    @classmethod
    def end_all(cls) -> None:
        """Stop following what another one was left with, whoever made it."""
        if cls._running is not None:
            cls._running.abandon()

    def start(self) -> None:
        """Follow every op from now on."""
        self.end_all()
        StepMeter._running = self
        self._marks = []
        self._tracker = StorageTracker()
        self._tracker.__enter__()

    def mark(self) -> None:
        """The optimizer's step begins, or has ended: it may allocate nothing, and have its peak all the same."""
        if self._tracker is not None:
            self._marks.append(len(self._tracker.events))

    def stop(self, step: int) -> StepMemory | None:
        """What was seen since `start`; None without one."""
        tracker = self.abandon()
        if tracker is None:
            return None
        before, after = (self._marks * 2)[:2] if self._marks else (-1, -1)
        peaks = dict.fromkeys(PHASES, 0)
        live_bytes = sum(size for record, size in tracker.existing if record.counted)
        for number, event in enumerate([None, *tracker.events]):
            if event is not None and event.record.counted:
                live_bytes += event.change_bytes
            phase = "optimizer" if before <= number <= after else "" if event is None else event.phase
            if phase in peaks:
                peaks[phase] = max(peaks[phase], live_bytes)
        profile = build_profile(tracker.existing, tracker.events, None, tracker.recomputed)
        return StepMemory(step=step, phase_peak_bytes=peaks, profile=profile)

    def abandon(self) -> StorageTracker | None:
        """Stop following, whatever was seen."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            StepMeter._running = None
            tracker.__exit__(None, None, None)
        return tracker
