"""Intervals of rows, one for each sliced axis.

An axis is a number: 0 for the first spatial dimension of the input (H of an image, T of a video), 1 for the next. A
value of the graph has each axis in one of its dimensions, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Interval = tuple[int, int]  # [start, stop)
Region = tuple[Interval, ...]  # one for each sliced axis, in the order of the schedule's axes


def union(regions: Sequence[Region]) -> Region:
    """The smallest region that holds them all."""
    return tuple((min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*regions, strict=True))


def lengths(region: Region) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in region)


def is_empty(region: Region) -> bool:
    return any(stop <= start for start, stop in region)


def shape_of(full: Sequence[int], dims: Sequence[int], region: Region) -> tuple[int, ...]:
    """The shape of the part of a tensor of shape `full` whose axes lie in `dims`."""
    shape = list(full)
    for dim, (start, stop) in zip(dims, region, strict=True):
        shape[dim] = stop - start
    return tuple(shape)


def part(x: Tensor, dims: Sequence[int], region: Region, base: Region | None = None) -> Tensor:
    """The part of `x` that covers `region`; `x` itself covers `base`, or all."""
    for i, (dim, (start, stop)) in enumerate(zip(dims, region, strict=True)):
        offset = start - (base[i][0] if base else 0)
        if stop - start != x.shape[dim]:
            x = torch.narrow(x, dim, offset, stop - start)
    return x
