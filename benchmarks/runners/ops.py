"""Measures op cases: at each size the check first, then bytes and times of all contenders in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

import memsave
from benchmarks.cases.case import short
from benchmarks.cases.op_case import Contender, Inputs, OpCase
from benchmarks.checks import CheckFailed
from benchmarks.formats import in_words

from .timing import elapsed, in_turns, no_garbage_collection, summary

TURN_S = 0.02
MAX_CALLS = 1000


def run_op_case(case: OpCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of every contender at every size, and why others have none.

    For each: `size`, `contender`, times of one call, and `peak_bytes`, what it allocates at its peak, result included.

    Raises:
        CheckFailed: memsave computes something else than plain PyTorch.
    """
    results: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    contenders = [contender for contender in case.contenders if device in contender.devices]
    with torch.no_grad():
        for size in case.sizes[device]:
            inputs = case.inputs(device=device, **size)
            named = {name: short(value) if isinstance(value, torch.dtype) else value for name, value in size.items()}
            try:
                case.check(**inputs)
            except AssertionError as error:
                raise CheckFailed(f"{case.name} at {named}: {error}") from error
            figures, failed = run_size(contenders, inputs, device, rounds)
            results += [{"size": named, "contender": name, **values} for name, values in figures.items()]
            left_out |= {f"{name} at {in_words(named)}": reason for name, reason in failed.items()}
    return results, left_out


def run_size(
    contenders: list[Contender], inputs: Inputs, device: str, rounds: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    calls: dict[str, int] = {}
    peaks: dict[str, int] = {}
    failed: dict[str, str] = {}
    able = []
    for contender in contenders:
        call = partial(contender.call, **inputs)
        try:
            with contender.within():
                calls[contender.name] = calls_per_turn(call, device)
                profile = memsave.measure(call)
        except Exception as error:  # whatever a tile that does not fit raises
            if not contender.may_fail:
                raise
            failed[contender.name] = f"{type(error).__name__}: {error}"
            continue
        peaks[contender.name] = profile.peak_bytes - profile.baseline_bytes
        able.append(contender)

    times: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in able}
    with no_garbage_collection():
        for index in in_turns(len(able), rounds):
            contender = able[index]
            call = partial(contender.call, **inputs)
            with contender.within():
                call()
                times[contender.name].append(elapsed(call, calls[contender.name], device))
    figures = {name: {"peak_bytes": peaks[name]} | asdict(summary(found)) for name, found in times.items()}
    return figures, failed


def calls_per_turn(call: Callable[[], Any], device: str) -> int:
    """So many calls that a turn takes about TURN_S; before, two calls warm up (on a GPU, the first tunes kernels)."""
    for _ in range(2):
        call()
    seconds, _ = elapsed(call, 1, device)
    return max(1, min(MAX_CALLS, int(TURN_S / seconds)))
