"""Numbers of a whole map that are gathered part by part: means, sums, maxima, and the moments that norms divide by.

x is (B, C, *spatial); a group norm has G groups of C / G channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import NotLocal
from ..regions import Interval, Region
from .local import Compute, Local, Reduction, accumulation_dtype, part_elements

aten = torch.ops.aten


class OverRows(Reduction):
    """A reduction over dimensions that include all sliced ones."""

    def __init__(self, node: fx.Node, source_dims: Sequence[int], over: Sequence[int]) -> None:
        super().__init__(node, node.args[0], source_dims)  # type: ignore[arg-type]
        self.over = tuple(over)
        if not set(source_dims) <= set(self.over):
            raise NotLocal("it reduces some of the sliced axes only")
        source, value = self.source.meta["val"], node.meta["val"]
        if source.is_complex():
            raise NotLocal("it reduces complex numbers")
        self.shape, self.dtype = tuple(value.shape), value.dtype
        self.wide = accumulation_dtype(source.dtype) if source.is_floating_point() else None
        if self.dtype is torch.float64:
            self.wide = torch.float64


class Sum(OverRows):
    """Sum or mean."""

    def __init__(self, node: fx.Node, source_dims: Sequence[int], over: Sequence[int], mean: bool) -> None:
        super().__init__(node, source_dims, over)
        self.divisor = math.prod(self.source_shape[d] for d in self.over) if mean else 1

    def add(self, state: Any, x: Tensor) -> Any:
        total = x.sum(self.over, dtype=self.wide)
        return total if state is None else state.add_(total)

    def finish(self, state: Any) -> Tensor:
        return (state if self.divisor == 1 else state / self.divisor).to(self.dtype).view(self.shape)


class Extremum(OverRows):
    """Largest or smallest element."""

    def __init__(self, node: fx.Node, source_dims: Sequence[int], over: Sequence[int], largest: bool) -> None:
        super().__init__(node, source_dims, over)
        self.largest = largest

    def add(self, state: Any, x: Tensor) -> Any:
        found = x.amax(self.over) if self.largest else x.amin(self.over)
        if state is None:
            return found
        return torch.maximum(state, found) if self.largest else torch.minimum(state, found)

    def finish(self, state: Any) -> Tensor:
        return state.view(self.shape)


class EuclideanNorm(OverRows):
    """The root of the sum of squares."""

    def add(self, state: Any, x: Tensor) -> Any:
        norm = torch.linalg.vector_norm(x, 2, self.over, dtype=self.wide)
        return norm if state is None else torch.hypot(state, norm)

    def finish(self, state: Any) -> Tensor:
        return state.to(self.dtype).view(self.shape)


class Variance(OverRows):
    """Variance, or its root."""

    def __init__(
        self, node: fx.Node, source_dims: Sequence[int], over: Sequence[int], correction: float, root: bool
    ) -> None:
        super().__init__(node, source_dims, over)
        self.correction, self.root = correction, root

    def add(self, state: Any, x: Tensor) -> Any:
        return merged_moments(state, moments_of(x, self.over))

    def extra_bytes(self, part: Region) -> int:
        return part_elements(self.source_shape, self.source_dims, part) * accumulation_dtype(self.dtype).itemsize

    def finish(self, state: Any) -> Tensor:
        count, _, squares = state
        variance = squares / max(0.0, count - self.correction)
        return (variance.sqrt() if self.root else variance).to(self.dtype).view(self.shape)


Moments = tuple[int, Tensor, Tensor]  # count, mean, and sum of squared differences from it


def moments_of(x: Tensor, over: Sequence[int]) -> Moments:
    """Over the dimensions `over`, which the results lose. (torch.var_mean takes ten times as long on CPU.)"""
    over = tuple(over)
    count = math.prod(x.shape[d] for d in over)
    mean = x.sum(over, dtype=accumulation_dtype(x.dtype)).div_(count)
    spread = mean
    for d in sorted(d % x.dim() for d in over):
        spread = spread.unsqueeze(d)
    return count, mean, (x - spread).square_().sum(over)


def merged_moments(state: Moments | None, part: Moments) -> Moments:
    """With those of one more part, exactly (Chan et al., 1979); the tensors given are used up."""
    if state is None:
        return part
    (before, old_mean, old_squares), (count, mean, squares) = state, part
    total = before + count
    difference = mean.sub_(old_mean)
    old_squares.add_(squares).addcmul_(difference, difference, value=before * count / total)
    return total, old_mean.add_(difference, alpha=count / total), old_squares


CHUNK_ELEMENTS = 2**18  # of a whole map at a time, so that what is centered stays in cache


def channel_moments(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """(2, B, C): what each channel is multiplied by and what is added, so that the group norm of `x` comes out."""
    rows = max(1, CHUNK_ELEMENTS * x.shape[2] // max(x.numel(), 1))
    state = None
    for start in range(0, x.shape[2], rows):
        part = x.narrow(2, start, min(rows, x.shape[2] - start))
        state = merged_moments(state, _grouped_moments(part, groups))
    assert state is not None  # a map has rows
    count, mean, squares = state
    return as_scale_and_shift(mean, squares / count, x.shape[1], weight, bias, eps)


def _grouped_moments(x: Tensor, groups: int) -> Moments:
    """Mean and squares (B, G), from those of the channels: maps with the channels last are summed up faster so."""
    count, mean, squares = moments_of(x, tuple(range(2, x.dim())))
    mean, squares = mean.unflatten(1, (groups, -1)), squares.unflatten(1, (groups, -1))  # (B, G, C / G)
    mean_of_group = mean.mean(2)
    between = (mean - mean_of_group.unsqueeze(2)).square_().sum(2)
    return count * mean.shape[2], mean_of_group, squares.sum(2).add_(between, alpha=count)


def as_scale_and_shift(
    mean: Tensor, variance: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """From mean and variance (B, G)."""
    batch, groups = mean.shape
    scale = torch.rsqrt(variance + eps).unsqueeze(2).expand(batch, groups, channels // groups).reshape(batch, channels)
    mean = mean.unsqueeze(2).expand(batch, groups, channels // groups).reshape(batch, channels)
    if weight is not None:
        scale = scale * weight.to(scale.dtype)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.to(shift.dtype)
    return torch.stack([scale, shift])


def scale_channels(x: Tensor, moments: Tensor) -> Tensor:
    """x * scale + shift, with the moments (2, B, C)."""
    scale, shift = moments.view(*moments.shape, *[1] * (x.dim() - 2))
    return torch.addcmul(shift, x, scale).to(x.dtype)


class ChannelMoments(Reduction):
    """`channel_moments`, merged from those of the parts."""

    def __init__(self, node: fx.Node, source_dims: Sequence[int]) -> None:
        super().__init__(node, node.args[0], source_dims)  # type: ignore[arg-type]
        if min(source_dims) < 2:
            raise NotLocal("a norm along its channels")
        self.groups: int = node.args[3]  # type: ignore[assignment]
        self.eps: float = node.args[4]  # type: ignore[assignment]
        self.parameters = tuple(n for n in node.args[1:3] if isinstance(n, fx.Node))
        self._has = [isinstance(n, fx.Node) for n in node.args[1:3]]
        self._wide = accumulation_dtype(node.args[0].meta["val"].dtype)  # type: ignore[union-attr]

    def add(self, state: Any, x: Tensor) -> Any:
        return merged_moments(state, _grouped_moments(x, self.groups))

    def extra_bytes(self, part: Region) -> int:
        return part_elements(self.source_shape, self.source_dims, part) * self._wide.itemsize

    def finish(self, state: Any, *parameters: Tensor) -> Tensor:
        count, mean, squares = state
        given = iter(parameters)
        weight, bias = (next(given) if has else None for has in self._has)
        return as_scale_and_shift(mean, squares / count, self.source_shape[1], weight, bias, self.eps)


class ScaleChannels(Local):
    """`scale_channels`: the second pass of a norm."""

    takes_out = True
    in_place = True

    def __init__(self, node: fx.Node, dims: Sequence[int]) -> None:
        source, moments = node.args[:2]
        by_example = tuple(dims) == (0,)  # then the moments (2, B, C) are sliced as well
        if not by_example and min(dims) < 2:
            raise NotLocal("a norm along its channels, or along examples and rows at once")
        sources, placed = ([source, moments], [dims, (1,)]) if by_example else ([source], [dims])
        super().__init__(node, sources, placed, dims, [] if by_example else [moments])  # type: ignore[arg-type, list-item]
        x = source.meta["val"]  # type: ignore[union-attr]
        self._wide = accumulation_dtype(x.dtype) is not x.dtype
        self.takes_out = self.in_place = not self._wide
        self._ones = [1] * (x.dim() - 2)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        if self._wide:
            return scale_channels
        ones = self._ones

        def compute(x: Tensor, moments: Tensor, out: Tensor | None = None) -> Tensor:
            scale, shift = moments.view(*moments.shape, *ones)
            return torch.addcmul(shift, x, scale) if out is None else torch.addcmul(shift, x, scale, out=out)

        return compute

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        return 4 * part_elements(self.shape, self.dims, out) if self._wide else 0
