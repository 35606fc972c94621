"""What an op must be able to say to be computed part by part.

A sliced input or output has the schedule's axes in its `dims`, one dimension for each axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..regions import Interval, Region, lengths, shape_of

Compute = Callable[..., Tensor]
"""Called with the parts of the sources, then with the other tensors; with `out=`, writes there, if it `takes_out`."""


class Local:
    """An op of which any part of the output needs only a part of each source.

    Attributes:
        node: the op.
        sources: the sliced inputs, in the order in which `Compute` takes them.
        source_dims: for each source, the dimension of each axis in it.
        others: what is read whole, after the sources.
        dims: the dimension of each axis in the output.
        shape: of the whole output.
        takes_out: whether the computation can write into a tensor that it is given.
        in_place: whether that tensor may be a source of the same shape: each element depends on one element of it.
        is_new: whether the output never shares the storage of a source.
        extra_bytes_per_element: what the op allocates and frees beside its output, for each element of it.
    """

    takes_out = False
    in_place = False
    is_new = True
    extra_bytes_per_element = 0

    def __init__(
        self,
        node: fx.Node,
        sources: Sequence[fx.Node],
        source_dims: Sequence[Sequence[int]],
        dims: Sequence[int],
        others: Sequence[fx.Node] = (),
    ) -> None:
        self.node = node
        self.sources = tuple(sources)
        self.source_dims = tuple(tuple(d) for d in source_dims)
        self.others = tuple(others)
        self.dims = tuple(dims)
        value = node.meta["val"]
        self.shape: tuple[int, ...] = tuple(value.shape)
        self.itemsize: int = value.element_size()
        self.source_sizes = tuple(
            tuple(source.meta["val"].shape[d] for d in ds)
            for source, ds in zip(self.sources, self.source_dims, strict=True)
        )

    def size(self, axis: int) -> int:
        """How many rows the output has along the schedule's `axis`."""
        return self.shape[self.dims[axis]]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        """The rows of source number `source` that the output's rows [start, stop) need; none beyond the border."""
        raise NotImplementedError

    def needs(self, source: int, out: Region) -> Region:
        return tuple(self.need(source, axis, a, b) for axis, (a, b) in enumerate(out))

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        """The computation of the output's part `out` from the parts `got` of the sources, as `needs` says them."""
        raise NotImplementedError

    def part_shape(self, out: Region) -> tuple[int, ...]:
        return shape_of(self.shape, self.dims, out)

    def part_bytes(self, out: Region) -> int:
        return math.prod(self.part_shape(out)) * self.itemsize

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        """Bytes that the computation allocates beside its result and frees again, at most at one moment."""
        return self.extra_bytes_per_element * math.prod(self.part_shape(out))

    def macs(self, out: Region, got: Sequence[Region]) -> int:
        """Multiply-accumulates of matrix products and convolutions for this part; elementwise work counts nothing."""
        return 0

    def reach(self, axis: int) -> tuple[int, int] | None:
        """(kernel, stride) along `axis`, for the report of what widens the field; None for an op with neither."""
        return None


class Reduction:
    """An op whose small output needs all rows of its source: it is gathered part by part.

    The state is a tuple of tensors. `start()` gives the first, `add` the next from a part, `finish` the output.
    """

    def __init__(self, node: fx.Node, source: fx.Node, source_dims: Sequence[int]) -> None:
        self.node = node
        self.source = source
        self.source_dims = tuple(source_dims)
        value = source.meta["val"]
        self.source_shape: tuple[int, ...] = tuple(value.shape)
        self.source_size = tuple(self.source_shape[d] for d in self.source_dims)

    def add(self, state: Any, x: Tensor) -> Any:
        raise NotImplementedError

    def finish(self, state: Any) -> Tensor:
        raise NotImplementedError

    def extra_bytes(self, part: Region) -> int:
        """About what adding a part allocates and frees again; the state is small."""
        return 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def part_elements(shape: Sequence[int], dims: Sequence[int], region: Region) -> int:
    return math.prod(shape_of(shape, dims, region))


__all__ = ["Compute", "Local", "Reduction", "accumulation_dtype", "lengths", "part_elements"]
