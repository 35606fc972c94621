"""What the executor runs: a list of steps over slots, planned once, with no decision left for the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .regions import Region

Slots = list[Any]
Run = Callable[[Slots], Any]


class Step(NamedTuple):
    """`slots[out] = run(slots)`, then the slots in `frees` are emptied. Slot 0 takes what nobody reads."""

    run: Run
    out: int
    frees: tuple[int, ...] = ()


def execute(steps: Sequence[Step], slots: Slots) -> None:
    for run, out, frees in steps:
        slots[out] = run(slots)
        for slot in frees:
            slots[slot] = None


class Read(NamedTuple):
    """An input of a step: a slot, and which part of the tensor in it: (dimension, offset, length) each."""

    slot: int
    narrows: tuple[tuple[int, int, int], ...] = ()


def read_part(slot: int, dims: Sequence[int], wanted: Region, held: Region) -> Read:
    """The part `wanted` of the tensor in `slot`, which covers `held`."""
    narrows = tuple(
        (dim, start - base, stop - start)
        for dim, (start, stop), (base, end) in zip(dims, wanted, held, strict=True)
        if (start, stop) != (base, end)
    )
    return Read(slot, narrows)


def _reader(reads: Sequence[Read]) -> Callable[[Slots], Sequence[Any]]:
    """A function that gives all inputs of a step."""
    slots = [r.slot for r in reads]
    if not any(r.narrows for r in reads):
        if len(slots) == 1:
            (only,) = slots
            return lambda env: (env[only],)
        return itemgetter(*slots) if slots else lambda env: ()
    if len(reads) == 1 and len(reads[0].narrows) == 1:
        (only,), ((dim, start, length),) = slots, reads[0].narrows
        return lambda env: (env[only].narrow(dim, start, length),)
    frozen = tuple(reads)

    def read(env: Slots) -> Sequence[Any]:
        found = []
        for slot, narrows in frozen:
            x = env[slot]
            for dim, start, length in narrows:
                x = x.narrow(dim, start, length)
            found.append(x)
        return found

    return read


def computing(compute: Callable[..., Tensor], reads: Sequence[Read]) -> Run:
    """A new tensor."""
    if len(reads) == 1 and not reads[0].narrows:
        slot = reads[0].slot
        return lambda env: compute(env[slot])
    read = _reader(reads)
    return lambda env: compute(*read(env))


def computing_in_place(compute: Callable[..., Tensor], reads: Sequence[Read], into: int) -> Run:
    """Over the tensor in slot `into`, which is one of the inputs and is read no more."""
    read = _reader(reads)
    return lambda env: compute(*read(env), out=env[into])


def computing_into(compute: Callable[..., Tensor], reads: Sequence[Read], into: Read, takes_out: bool) -> Run:
    """Into a part of a tensor that exists."""
    read, (slot, narrows) = _reader(reads), into

    def run(env: Slots) -> None:
        target = env[slot]
        for dim, start, length in narrows:
            target = target.narrow(dim, start, length)
        if takes_out:
            compute(*read(env), out=target)
        else:
            target.copy_(compute(*read(env)))

    return run


def extending(
    compute: Callable[..., Tensor],
    reads: Sequence[Read],
    carry: int,
    dim: int,
    takes_out: bool,
    rows: int,
    shape: tuple[int, ...],
) -> Run:
    """A window: the rows carried over from the last band in slot `carry`, then the `rows` new ones."""
    read = _reader(reads)
    if not takes_out:
        return lambda env: torch.cat((env[carry], compute(*read(env))), dim)
    carried = shape[dim] - rows

    def run(env: Slots) -> Tensor:
        old = env[carry]
        window = _empty_like(old, shape)
        window.narrow(dim, 0, carried).copy_(old)
        compute(*read(env), out=window.narrow(dim, carried, rows))
        return window

    return run


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    form = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def keeping(slot: int, dim: int, start: int, rows: int) -> Run:
    """The rows of a window that the next band reads, as a tensor of their own."""
    return lambda env: env[slot].narrow(dim, start, rows).clone()


def allocating(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, like: int) -> Run:
    """A tensor without values, on the device of the tensor in slot `like`."""
    return lambda env: torch.empty_strided(shape, stride, dtype=dtype, device=env[like].device)
