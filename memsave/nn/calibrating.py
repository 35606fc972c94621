"""What every calibration does: runs a model over batches, pass after pass, within a budget, and disturbs nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from operator import length_hint
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def run(model: nn.Module, batch: Any) -> Any:
    """The output for a batch: a mapping of keyword arguments, a tuple or list of arguments, or the only argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def check_batches(batches: Iterable[Any]) -> None:
    """Raise ValueError for what is a single batch, or cannot be iterated over."""
    several = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (Mapping, Tensor, str)) or not several:
        raise ValueError(f"batches: expected an iterable of batches, such as a list, got {type(batches).__name__}")


def check_passes(batches: Iterable[Any], num_passes: int, sums: str) -> None:
    """Raise ValueError for a one-shot iterator that several passes would read; `sums` says what takes the budget."""
    if num_passes > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a one-shot iterator ({type(batches).__name__}), but {num_passes} passes are needed; give a list "
            f"or a DataLoader, or a budget_bytes in which {sums} fit"
        )


def same_count(before: int | None, now: int) -> int:
    """`now`, how many batches a pass gave; ValueError if there were none, or not as many as in the pass before."""
    if not now:
        raise ValueError("batches: expected at least one batch, got none")
    if before not in (None, now):
        raise ValueError(
            f"batches: the first pass gave {before:,} batches, a later one {now:,}; expected an iterable that gives "
            f"the same batches each time, such as a list"
        )
    return now


def accumulator_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def cut(sizes: Mapping[str, int], budget_bytes: int | None) -> list[list[str]]:
    """Names in their order, cut where the bytes would exceed the budget; None means the largest of them."""
    budget = max(sizes.values(), default=0) if budget_bytes is None else budget_bytes
    groups: list[list[str]] = []
    used = 0
    for name, size in sizes.items():
        if not groups or used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return groups


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Random numbers inside start where the caller's are, and leave those as they are."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.device.type != "cpu"}
    with ExitStack() as stack:
        for kind in sorted({device.type for device in devices} - {"meta"}):
            numbers = [device.index or 0 for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(numbers, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in eval mode inside, and in their own afterwards; by their flags, so that no `train` method runs."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def progress(
    items: Iterable[T], desc: str, unit: str, *, delay_seconds: float = 0.0, total: int | None = None
) -> Iterator[Iterable[T]]:
    """The items, with a progress bar if there are several, someone may be looking, and tqdm is installed.

    It appears after `delay_seconds`. `total` says how many items there are; by default their length does.
    """
    bar = None
    total = length_hint(items, -1) if total is None else total  # -1: unknown
    if total not in (0, 1) and sys.stderr is not None and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            known = None if total < 0 else total
            bar = tqdm(items, desc=desc, unit=unit, total=known, leave=False, delay=delay_seconds)
    try:
        yield items if bar is None else bar
    finally:
        if bar is not None:
            bar.close()
