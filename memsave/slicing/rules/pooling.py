"""Max and average pooling over windows: x (B, C, *spatial)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..regions import Interval, Region
from .convolution import Pads, check_spatial, flat_pads, per_dimension, window_interval, window_pads, with_defaults
from .local import Compute, Local, accumulation_dtype

MAX: dict[int, Any] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def _avg_pool1d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], *, divisor_override: int | None) -> Tensor:
    """`F.avg_pool1d` takes no divisor."""
    return F.avg_pool2d(x.unsqueeze(-2), (1, *kernel), (1, *stride), divisor_override=divisor_override).squeeze(-2)


AVERAGE: dict[int, Any] = {1: _avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Pooling(Local):
    """What both kinds share: windows, and the padding that the last windows of `ceil_mode` reach into."""

    def __init__(
        self, node: fx.Node, dims: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any
    ) -> None:
        super().__init__(node, [node.args[0]], [dims], dims)  # type: ignore[list-item]
        n = int(node.target.overloadpacket.__name__[-2])  # type: ignore[union-attr]  # as in max_pool2d
        check_spatial("a pooling", self.shape, n, dims)
        self.kernel = per_dimension(kernel, n)
        self.stride = per_dimension(stride, n) if stride not in (None, [], ()) else self.kernel
        self.padding, self.dilation = per_dimension(padding, n), per_dimension(dilation, n)
        source = node.args[0].meta["val"].shape  # type: ignore[union-attr]
        whole = list(zip(source[2:], self.shape[2:], range(n), strict=True))
        self.pads = [
            window_pads((0, size), (0, rows), self.kernel[j], self.stride[j], self.dilation[j], self.padding[j])
            for rows, size, j in whole
        ]

    def _window(self, j: int) -> tuple[int, int, int, int]:
        return self.kernel[j], self.stride[j], self.dilation[j], self.padding[j]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        if self.dims[axis] == 0:
            return start, stop
        return window_interval(start, stop, self.source_sizes[0][axis], *self._window(self.dims[axis] - 2))

    def _part_pads(self, out: Region, got: Region) -> list[Pads]:
        """The padding of a part; a negative one cuts off rows that no window reads."""
        pads = list(self.pads)
        for axis, d in enumerate(self.dims):
            if d == 0:
                continue
            pads[d - 2] = window_pads(out[axis], got[axis], *self._window(d - 2))
        return pads

    def reach(self, axis: int) -> tuple[int, int] | None:
        if self.dims[axis] == 0:
            return None
        kernel, stride, dilation, _ = self._window(self.dims[axis] - 2)
        return dilation * (kernel - 1) + 1, stride


class MaxPooling(Pooling):
    extra_bytes_per_element = 8  # the places of the maxima

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        pads = self._part_pads(out, got[0])
        function, settings = MAX[len(self.kernel)], (self.kernel, self.stride)
        if all(before == after for before, after in pads) and self._fits(pads):
            native, dilation = [before for before, _ in pads], self.dilation
            return lambda x: function(x, *settings, native, dilation)
        added, dilation = flat_pads(pads), self.dilation
        return lambda x: function(F.pad(x, added, value=-float("inf")), *settings, 0, dilation)

    def _fits(self, pads: Sequence[Pads]) -> bool:
        """Whether torch takes the padding: at least 0, at most half the kernel."""
        return all(0 <= before <= kernel // 2 for (before, _), kernel in zip(pads, self.kernel, strict=True))


class AveragePooling(Pooling):
    """Sums over padded windows, divided by how many elements count; inner windows count them all."""

    def __init__(
        self,
        node: fx.Node,
        dims: Sequence[int],
        kernel: Any,
        stride: Any,
        padding: Any,
        *,
        include_pad: bool,
        divisor: int | None,
    ) -> None:
        super().__init__(node, dims, kernel, stride, padding, 1)
        self.include_pad, self.divisor = include_pad, divisor

    def _counts(self, j: int, start: int, stop: int) -> list[int]:
        """How many rows each of the outputs [start, stop) counts along spatial dimension `j`."""
        size = self.node.args[0].meta["val"].shape[2 + j]  # type: ignore[union-attr]
        kernel, stride, pad = self.kernel[j], self.stride[j], self.padding[j]
        low, high = (-pad, size + pad) if self.include_pad else (0, size)
        return [min(row * stride - pad + kernel, high) - max(row * stride - pad, low) for row in range(start, stop)]

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        pads = self._part_pads(out, got[0])
        added = flat_pads(pads) if any(map(any, pads)) else None
        function = AVERAGE[len(self.kernel)]
        spans = [(0, size) for size in self.shape[2:]]
        for axis, d in enumerate(self.dims):
            if d:
                spans[d - 2] = out[axis]
        counts = [self._counts(j, *span) for j, span in enumerate(spans)]
        full = all(count == kernel for row, kernel in zip(counts, self.kernel, strict=True) for count in row)
        kernel, stride, divisor = self.kernel, self.stride, self.divisor
        if self.divisor or full:
            return lambda x: function(F.pad(x, added) if added else x, kernel, stride, divisor_override=divisor)
        weight = torch.ones((), dtype=torch.float64)
        for row, size in zip(counts, kernel, strict=True):
            weight = weight.unsqueeze(-1) * (size / torch.tensor(row, dtype=torch.float64))

        def compute(x: Tensor) -> Tensor:
            # As if all elements of each window counted, which no dtype overflows in; then what really does.
            y = function(F.pad(x, added) if added else x, kernel, stride, divisor_override=None)
            return y.mul_(weight.to(y.device, accumulation_dtype(y.dtype)))

        return compute


def max_pooling(node: fx.Node, dims: Sequence[int]) -> Local:
    _, kernel, stride, padding, dilation, _ = with_defaults(node, (None, None, [], 0, 1, False))
    return MaxPooling(node, dims, kernel, stride, padding, dilation)


def average_pooling(node: fx.Node, dims: Sequence[int]) -> Local:
    defaults: tuple[Any, ...] = (None, None, [], 0, False, True, None)
    _, kernel, stride, padding, _, include_pad, divisor = with_defaults(node, defaults)
    return AveragePooling(node, dims, kernel, stride, padding, include_pad=include_pad, divisor=divisor)
