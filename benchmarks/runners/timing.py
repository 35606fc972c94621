"""Times in turns: whatever else the machine does then slows all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one call: the median with the quartiles, and the median CPU time of all threads of the process."""

    median_s: float
    low_s: float
    high_s: float
    cpu_s: float


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def elapsed(call: Callable[[], Any], calls: int, device: str) -> tuple[float, float]:
    """(seconds, CPU seconds) of one of `calls` calls in a row, until the device is done with the last."""
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / calls, (time.process_time() - cpu_start) / calls


def in_turns(count: int, rounds: int) -> Iterator[int]:
    """0 ... count - 1 in every round, beginning with another one each time."""
    for first in range(rounds):
        yield from ((first + turn) % count for turn in range(count))


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def summary(times: Sequence[tuple[float, float]]) -> Times:
    """Of (seconds, CPU seconds), at least two."""
    low, median, high = statistics.quantiles((seconds for seconds, _ in times), n=4, method="inclusive")
    return Times(median_s=median, low_s=low, high_s=high, cpu_s=statistics.median(cpu for _, cpu in times))
