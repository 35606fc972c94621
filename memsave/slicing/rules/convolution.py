"""Convolutions and transposed convolutions: x (B, C, *spatial), weight (O, C / groups, *kernel).

Padding is added where a part touches the border of the whole input, and nowhere else: rows beyond a part's edge are
rows of the map, not zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..errors import NotLocal
from ..regions import Interval, Region, shape_of
from .local import Compute, Local

Pads = tuple[int, int]
CONVOLUTIONS = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}


def per_dimension(value: Any, dimensions: int) -> tuple[int, ...]:
    """An argument that may be one number for all spatial dimensions."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dimensions if len(values) == 1 else values


def window_interval(start: int, stop: int, size: int, kernel: int, stride: int, dilation: int, pad: int) -> Interval:
    """The rows of an input of `size` rows that a sliding window's outputs [start, stop) read, border rows clipped."""
    low = start * stride - pad
    high = (stop - 1) * stride - pad + dilation * (kernel - 1) + 1
    return max(0, min(low, size - 1)), max(1, min(high, size))


def window_pads(out: Interval, got: Interval, kernel: int, stride: int, dilation: int, pad: int) -> Pads:
    """How many rows must be added before and after the rows `got`, so that they give exactly the outputs `out`."""
    low = out[0] * stride - pad
    high = (out[1] - 1) * stride - pad + dilation * (kernel - 1) + 1
    return got[0] - low, high - got[1]


def flat_pads(pads: Sequence[Pads]) -> list[int]:
    """In the order of F.pad, last dimension first."""
    return [amount for pair in reversed(pads) for amount in pair]


def check_spatial(what: str, shape: Sequence[int], spatial: int, dims: Sequence[int]) -> None:
    """Each example of a batch may be a part, and so may rows of a map; channels may not."""
    if len(shape) != spatial + 2:
        raise NotLocal(f"{what} of maps without a batch")
    if 1 in dims:
        raise NotLocal(f"{what} along its channels")


class Convolution(Local):
    """`pads` are (before, after) for each spatial dimension; `padding` nodes before it may have been merged in."""

    def __init__(
        self,
        node: fx.Node,
        dims: Sequence[int],
        *,
        stride: Sequence[int],
        pads: Sequence[Pads],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        others = [n for n in (weight, bias) if isinstance(n, fx.Node)]
        super().__init__(node, [x], [dims], dims, others)  # type: ignore[list-item]
        self.stride, self.pads, self.dilation, self.groups = tuple(stride), tuple(pads), tuple(dilation), groups
        self.weight_shape: tuple[int, ...] = tuple(weight.meta["val"].shape)  # type: ignore[union-attr]
        self.kernel = self.weight_shape[2:]
        check_spatial("a convolution", self.shape, len(self.kernel), dims)
        for d in dims:
            if d and max(self.pads[d - 2]) > self.dilation[d - 2] * (self.kernel[d - 2] - 1):
                raise NotLocal("a convolution whose windows lie in the padding alone")

    def _window(self, axis: int) -> tuple[int, int, int, int]:
        j = self.dims[axis] - 2
        return self.kernel[j], self.stride[j], self.dilation[j], self.pads[j][0]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        if self.dims[axis] == 0:
            return start, stop
        kernel, stride, dilation, pad = self._window(axis)
        return window_interval(start, stop, self.source_sizes[0][axis], kernel, stride, dilation, pad)

    def _part_pads(self, out: Region, got: Region) -> list[Pads]:
        pads = list(self.pads)
        for axis, d in enumerate(self.dims):
            if d == 0:
                continue
            pads[d - 2] = window_pads(out[axis], got[axis], *self._window(axis))
        return pads

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        pads = self._part_pads(out, got[0])
        function, options = CONVOLUTIONS[len(self.kernel)], (self.dilation, self.groups)
        stride, native = self.stride, tuple(pad if pad == after else 0 for pad, after in pads)
        added = flat_pads([(0, 0) if pad == after else (pad, after) for pad, after in pads])
        if not any(added):
            return lambda x, weight, bias=None: function(x, weight, bias, stride, native, *options)
        return lambda x, weight, bias=None: function(F.pad(x, added), weight, bias, stride, native, *options)

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        pads = self._part_pads(out, got[0])
        if all(before == after for before, after in pads):
            return 0
        shape = list(shape_of(self.sources[0].meta["val"].shape, self.source_dims[0], got[0]))
        for j, (before, after) in enumerate(pads):
            shape[j + 2] += before + after if before != after else 0
        return math.prod(shape) * self.itemsize

    def macs(self, out: Region, got: Sequence[Region]) -> int:
        return math.prod(self.part_shape(out)) * math.prod(self.weight_shape[1:])

    def reach(self, axis: int) -> tuple[int, int] | None:
        if self.dims[axis] == 0:
            return None
        kernel, stride, dilation, _ = self._window(axis)
        return dilation * (kernel - 1) + 1, stride


class TransposedConvolution(Local):
    """weight is (C, O / groups, *kernel). Each input row adds to `kernel` output rows; a part's edge is cut off."""

    def __init__(
        self,
        node: fx.Node,
        dims: Sequence[int],
        *,
        stride: Sequence[int],
        padding: Sequence[int],
        output_padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        x, weight = node.args[0], node.args[1]
        bias = node.args[2] if len(node.args) > 2 else None
        others = [n for n in (weight, bias) if isinstance(n, fx.Node)]
        super().__init__(node, [x], [dims], dims, others)  # type: ignore[list-item]
        self.stride, self.padding, self.output_padding = tuple(stride), tuple(padding), tuple(output_padding)
        self.dilation, self.groups = tuple(dilation), groups
        self.weight_shape: tuple[int, ...] = tuple(weight.meta["val"].shape)  # type: ignore[union-attr]
        self.kernel = self.weight_shape[2:]
        check_spatial("a transposed convolution", self.shape, len(self.kernel), dims)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        if self.dims[axis] == 0:
            return start, stop
        j, size = self.dims[axis] - 2, self.source_sizes[0][axis]
        span = self.dilation[j] * (self.kernel[j] - 1)
        low = -((span - start - self.padding[j]) // self.stride[j])  # the first row whose last output is >= start
        # With strides beyond the kernel, outputs lie between those of two rows: the one above them counts them in.
        low = min(low, (start + self.padding[j]) // self.stride[j])
        high = (stop - 1 + self.padding[j]) // self.stride[j] + 1
        return max(0, min(low, size - 1)), max(1, min(high, size))

    def _crop(self, axis: int, out: Interval, got: Interval) -> tuple[int, int, int]:
        """What the rows `got` give without padding: where the rows `out` begin in it, its length, the rows it lacks."""
        j = self.dims[axis] - 2
        begin = out[0] + self.padding[j] - got[0] * self.stride[j]
        made = (got[1] - got[0] - 1) * self.stride[j] + self.dilation[j] * (self.kernel[j] - 1) + 1
        return begin, made, max(0, begin + out[1] - out[0] - made)

    def _crops(self, out: Region, got: Region) -> list[tuple[int, int, int, int, int]]:
        """Where not just the rows `out` are made: (dimension, the first of them, how many, how many lack, all made)."""
        crops = []
        for axis, d in enumerate(self.dims):
            if d:
                begin, made, lacking = self._crop(axis, out[axis], got[axis])
                length = out[axis][1] - out[axis][0]
                if (begin, made) != (0, length):
                    crops.append((d, begin, length, lacking, made))
        return crops

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        function = TRANSPOSED[len(self.kernel)]
        padding, further = list(self.padding), list(self.output_padding)
        for d in self.dims:
            if d:
                padding[d - 2], further[d - 2] = 0, 0
        crops = self._crops(out, got[0])
        stride, groups, dilation = self.stride, self.groups, self.dilation
        if not crops:
            return lambda x, weight, bias=None: function(x, weight, bias, stride, padding, further, groups, dilation)

        def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            y = function(x, weight, None, stride, padding, further, groups, dilation)
            for d, begin, length, lacking, _ in crops:
                if lacking:  # rows that no input reaches: output_padding, or strides beyond the kernel
                    y = F.pad(y, [0, 0] * (y.dim() - 1 - d) + [0, lacking])
                y = y.narrow(d, begin, length)
            # A new tensor, so that what was cut off is freed.
            return y.clone() if bias is None else y + bias.view(-1, *[1] * (y.dim() - 2))

        return compute

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        crops = self._crops(out, got[0])
        if not crops:
            return 0
        shape = list(self.part_shape(out))
        for d, *_, made in crops:
            shape[d] = made
        held = math.prod(shape) * self.itemsize
        most = held + self.part_bytes(out)
        for d, _, length, lacking, _ in crops:
            if lacking:
                shape[d] += lacking
                padded = math.prod(shape) * self.itemsize
                most, held = max(most, held + padded), padded
            shape[d] = length
        return max(most, held + self.part_bytes(out)) - self.part_bytes(out)

    def macs(self, out: Region, got: Sequence[Region]) -> int:
        shape = shape_of(self.sources[0].meta["val"].shape, self.source_dims[0], got[0])
        return math.prod(shape) * math.prod(self.weight_shape[1:])

    def reach(self, axis: int) -> tuple[int, int] | None:
        return None


def convolution(node: fx.Node, dims: Sequence[int]) -> Local:
    """The rule of `aten.conv{1,2,3}d`, with numbers or 'same' and 'valid' as padding."""
    _, weight, _, stride, padding, dilation, groups = with_defaults(node, (None, None, None, 1, 0, 1, 1))
    kernel = weight.meta["val"].shape[2:]
    n = len(kernel)
    stride, dilation = per_dimension(stride, n), per_dimension(dilation, n)
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in per_dimension(padding, n)]
    merged = node.meta.get("merged_pads", [(0, 0)] * n)
    pads = [(a + c, b + d) for (a, b), (c, d) in zip(pads, merged, strict=True)]
    return Convolution(node, dims, stride=stride, pads=pads, dilation=dilation, groups=groups)


def transposed_convolution(node: fx.Node, dims: Sequence[int]) -> Local:
    """The rule of `aten.conv_transpose{1,2,3}d`."""
    defaults = (None, None, None, 1, 0, 0, 1, 1)
    _, weight, _, stride, padding, output_padding, groups, dilation = with_defaults(node, defaults)
    n = len(weight.meta["val"].shape) - 2
    return TransposedConvolution(
        node,
        dims,
        stride=per_dimension(stride, n),
        padding=per_dimension(padding, n),
        output_padding=per_dimension(output_padding, n),
        dilation=per_dimension(dilation, n),
        groups=groups,
    )


def with_defaults(node: fx.Node, defaults: Sequence[Any]) -> list[Any]:
    """The arguments of `node` in the order of its schema, the missing ones from `defaults`."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    values = list(node.args) + list(defaults[len(node.args) :])
    for name, value in node.kwargs.items():
        values[names.index(name)] = value
    return values
