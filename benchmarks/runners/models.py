"""Measures model cases: gradients checked first, then the bytes, then the times of all variants in turns.

One variant is alive at a time, built anew for each turn: large models fit, and none feels what another left behind.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import memsave
from benchmarks.cases.methods import OwnVariant
from benchmarks.cases.training import ModelCase
from benchmarks.cases.variants import Variant
from benchmarks.checks import check_exact, check_own, check_unbiased

from .steps import opened
from .timing import elapsed, in_turns, no_garbage_collection, summary, synchronize

STEPS_PER_TURN = {"cpu": 1, "cuda": 3}


def run_model_case(case: ModelCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of every variant, from `rounds` timed steps each, and why others have none.

    For each variant: `kept_bytes` for backward after forward (None where it cannot be counted); `peak_bytes` of all
    live storages, weights, gradients and optimizer states included (None for compiled code on a GPU);
    `allocator_peak_bytes`, the same as torch's CUDA allocator counts it (None on the CPU); times; `error` of the
    gradients, see `checks`.

    Raises:
        CheckFailed: a variant that is not optional computes something else than the plain model.
    """
    errors, left_out = checked(case, device)
    variants, figures = [], []
    for variant in (variant for variant in case.variants if variant.name in errors):
        with may_be_left_out(variant, left_out):
            found = bytes_of(case, variant, device)
            figures.append({"variant": variant.name, **found, "error": errors[variant.name]})
            variants.append(variant)
    times: list[list[tuple[float, float]]] = [[] for _ in variants]
    steps = STEPS_PER_TURN.get(device, 1)
    for index in in_turns(len(variants), max(1, rounds // steps)):
        times[index] += turn(case, variants[index], device, steps)
    return [f | asdict(summary(t)) for f, t in zip(figures, times, strict=True)], left_out


def checked(case: ModelCase, device: str) -> tuple[dict[str, float], dict[str, str]]:
    """By variant: the error of its gradients, or why it is left out."""
    case = replace(case, **case.gate)
    truth = gradients(case, case.variants[0], device, torch.float64)
    plain = gradients(case, case.variants[0], device)
    errors, left_out = {}, {}
    for variant in case.variants:
        if variant.package and find_spec(variant.package) is None:
            left_out[variant.name] = f"{variant.package} is not installed"
            continue
        if isinstance(variant, OwnVariant):
            with memsave.ops.use_reference():
                reference = gradients(case, variant, device)
            errors[variant.name] = check_own(variant.name, gradients(case, variant, device), reference)
            continue
        with may_be_left_out(variant, left_out), opened(case, variant, device) as step:
            found, sampled = step.gradients(), step.sampled()
            error = check_exact(variant.name, found, plain, truth, sampled, case.dtype)
            errors[variant.name] = check_unbiased(variant.name, step, truth) if sampled else error
        release(device)
    return errors, left_out


@contextmanager
def may_be_left_out(variant: Variant, left_out: dict[str, str]) -> Iterator[None]:
    """A variant that needs a package of its own takes nothing with it, whatever that package's code raises."""
    try:
        yield
    except Exception as error:
        if not variant.package:
            raise
        left_out[variant.name] = f"{type(error).__name__}: {error}"


def gradients(
    case: ModelCase, variant: Variant, device: str, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    with opened(case, variant, device, dtype) as step:
        return step.gradients()


def bytes_of(case: ModelCase, variant: Variant, device: str) -> dict[str, int | None]:
    with opened(case, variant, device) as step:
        step.run()  # the first step makes the optimizer's states
        step.clear()
        # First of all: `measure` looks at every operator, and torch.compile then gives the model up for good.
        added_bytes = allocated_bytes(step.run, device) if variant.compiled or device != "cpu" else 0
        step.clear()
        kept_bytes = memsave.saved_bytes(step.forward) if variant.counts_kept else None
        measured = memsave.measure(step.run)
        step.clear()
    release(device)
    allocator_peak_bytes = measured.baseline_bytes + added_bytes
    peak_bytes = measured.peak_bytes if not variant.compiled else allocator_peak_bytes if device == "cpu" else None
    return {
        "kept_bytes": kept_bytes,
        "peak_bytes": peak_bytes,
        "allocator_peak_bytes": None if device == "cpu" else allocator_peak_bytes,
    }


def allocated_bytes(run: Callable[[], object], device: str) -> int:
    """The largest sum of what torch's allocator gives out during `run` beyond what it held before.

    On the CPU it is the sum that `memsave.measure` finds, also where operators run in compiled code.
    """
    if device != "cpu":
        before_bytes = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before_bytes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes_bytes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes_bytes))


def turn(case: ModelCase, variant: Variant, device: str, steps: int) -> Sequence[tuple[float, float]]:
    """Times of some steps of a variant, after two to warm up: on a GPU, the first one tunes kernels."""
    times = []
    with opened(case, variant, device) as step:
        for _ in range(2):
            step.run()
            step.clear()
        with no_garbage_collection():
            for _ in range(steps):
                times.append(elapsed(step.run, 1, device))
                step.clear()
    release(device)
    return times


def release(device: str) -> None:
    """Free on a GPU what the last variant held; a large model must not wait there for Python to find its cycles."""
    if device != "cpu":
        gc.collect()
        torch.cuda.empty_cache()
