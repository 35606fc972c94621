"""Ops that move data or name dimensions anew: permutations, views, concatenation, slices, padding, pixel shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..errors import NotLocal
from ..regions import Interval, Region, shape_of
from .convolution import check_spatial, with_defaults
from .local import Compute, Local

aten = torch.ops.aten


def crops_of(dims: Sequence[int], out: Region, made: Region) -> list[tuple[int, int, int]]:
    """What to narrow so that of the rows `made` the rows `out` remain."""
    spans = zip(dims, out, made, strict=True)
    return [(d, a - c, b - a) for d, (a, b), (c, e) in spans if (a, b) != (c, e)]


class SameRows(Local):
    """An op that takes each row of its source to the same row of its output, wherever the dimension goes."""

    is_new = False

    def __init__(self, node: fx.Node, source_dims: Sequence[int], dims: Sequence[int], view: bool = False) -> None:
        super().__init__(node, [node.args[0]], [source_dims], dims)  # type: ignore[list-item]
        self.is_view = view

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        target: Any = self.node.target
        args, kwargs = self.node.args[1:], dict(self.node.kwargs)
        return lambda x: target(x, *args, **kwargs)


class Reshape(Local):
    """A view: sliced dimensions stay, are merged with those after them, or are split off from them.

    `factors` says how many rows of the output a row of the source is (H and W merged: W), or 1 / that.
    """

    is_new = False

    def __init__(
        self,
        node: fx.Node,
        source_dims: Sequence[int],
        dims: Sequence[int],
        merged: Sequence[int],
        split: Sequence[int],
    ) -> None:
        super().__init__(node, [node.args[0]], [source_dims], dims)  # type: ignore[list-item]
        self.merged, self.split = tuple(merged), tuple(split)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        merged, split = self.merged[axis], self.split[axis]
        return start * split // merged, -(-stop * split // merged)

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        made = tuple((a * m // s, b * m // s) for (a, b), m, s in zip(got[0], self.merged, self.split, strict=True))
        shape = shape_of(self.shape, self.dims, made)
        crops = crops_of(self.dims, out, made)

        def compute(x: torch.Tensor) -> torch.Tensor:
            y = x.reshape(shape)
            for d, start, length in crops:
                y = y.narrow(d, start, length)
            return y

        return compute


class Expansion(Local):
    """Repeats by strides of 0, along dimensions that are not sliced, or of a tensor that is the same for all rows."""

    is_new = False

    def __init__(self, node: fx.Node, dims: Sequence[int]) -> None:
        x = node.args[0]
        old, new = x.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        placed = [d - len(new) + len(old) for d in dims]
        spread = [d < 0 or old[d] == 1 != new[e] for d, e in zip(placed, dims, strict=True)]
        if any(spread) and not all(spread):
            raise NotLocal("it is expanded along some of the sliced axes only")
        sliced = not any(spread)
        super().__init__(node, [x] if sliced else [], [placed] if sliced else [], dims, [] if sliced else [x])  # type: ignore[list-item]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        shape = self.part_shape(out)
        return lambda x: x.expand(shape)


class Concatenation(Local):
    """Along a dimension that is not sliced."""

    def __init__(self, node: fx.Node, sources: Sequence[fx.Node], dims: Sequence[int], along: int) -> None:
        super().__init__(node, sources, [dims] * len(sources), dims)
        self.along = along
        if along in dims:
            raise NotLocal("a concatenation along the rows")
        self.takes_out = all(x.meta["val"].dtype == node.meta["val"].dtype for x in sources)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        along = self.along
        return lambda *parts, out=None: torch.cat(parts, along) if out is None else torch.cat(parts, along, out=out)


class Cut(Local):
    """`x[..., start:stop:step]` along a sliced dimension, or another."""

    is_new = False

    def __init__(self, node: fx.Node, dims: Sequence[int], along: int, start: int, step: int) -> None:
        super().__init__(node, [node.args[0]], [dims], dims)  # type: ignore[list-item]
        self.along, self.start, self.step = along, start, step

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        if self.dims[axis] != self.along:
            return start, stop
        return self.start + start * self.step, self.start + (stop - 1) * self.step + 1

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        if self.along in self.dims:
            step, along = self.step, self.along
            every = slice(None, None, step)
            return lambda x: x[(slice(None),) * along + (every,)] if step > 1 else x
        target: Any = self.node.target
        args = self.node.args[1:]
        return lambda x: target(x, *args)


class Padding(Local):
    """`aten.pad` in every mode; negative amounts cut off. Where a mode repeats rows, the output's rows are gathered."""

    is_new = False

    def __init__(self, node: fx.Node, dims: Sequence[int]) -> None:
        super().__init__(node, [node.args[0]], [dims], dims)  # type: ignore[list-item]
        amounts: Any
        _, amounts, self.mode, self.value = with_defaults(node, (None, None, "constant", None))
        rank = len(self.shape)
        self.pads = [(0, 0)] * rank
        for i in range(len(amounts) // 2):
            self.pads[rank - 1 - i] = (amounts[2 * i], amounts[2 * i + 1])

    def _row(self, axis: int, row: int) -> int:
        """Which row of the source the output's `row` shows; below 0 or beyond the last for the padding value."""
        size, row = self.source_sizes[0][axis], row - self.pads[self.dims[axis]][0]
        if self.mode == "replicate":
            return max(0, min(row, size - 1))
        if self.mode == "circular":
            return row % size
        if self.mode == "reflect":
            return -row if row < 0 else 2 * (size - 1) - row if row >= size else row
        return row

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        size = self.source_sizes[0][axis]
        before, after = self.pads[self.dims[axis]]
        # Rows that differ from those next to them lie at the ends: two rows at each, and those of the padding.
        inner = (max(start, before), min(stop, before + size))
        rows = [r for r in range(start, stop) if r < before or r >= before + size] + [*inner, inner[1] - 1]
        shown = [self._row(axis, r) for r in rows if start <= r < stop]
        shown = [r for r in shown if 0 <= r < size] or [0 if start < before else size - 1]
        return min(shown), max(shown) + 1

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        steps: list[tuple[int, Any]] = []
        constant = [(0, 0)] * len(self.shape)
        for axis, d in enumerate(self.dims):
            (start, stop), (low, high) = out[axis], got[0][axis]
            if self.mode == "constant":
                before, after = low - (start - self.pads[d][0]), (stop - self.pads[d][0]) - high
                inside = before < stop - start and after < stop - start
                # Rows of the padding alone: none of the row that was read.
                constant[d] = (before, after) if inside else (stop - start, low - high)
            else:
                rows = [self._row(axis, r) - low for r in range(start, stop)]
                if rows != list(range(high - low)):
                    steps.append((d, torch.tensor(rows)))
        rest = [pad if d not in self.dims else constant[d] for d, pad in enumerate(self.pads)]
        last = max((d for d, pad in enumerate(rest) if any(pad)), default=len(rest))
        first = min((d for d, pad in enumerate(rest) if any(pad)), default=len(rest))
        spatial = self.mode != "constant" and last < len(rest)
        first = min(first, 2) if spatial else first  # torch pads whole spatial ranks only in the other modes
        amounts = [amount for pad in reversed(rest[first:]) for amount in pad]
        mode, value = self.mode, self.value

        def compute(x: torch.Tensor) -> torch.Tensor:
            for d, rows in steps:
                x = x.index_select(d, rows.to(x.device))
            return F.pad(x, amounts, mode, value) if amounts else x

        return compute

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        if self.mode == "constant":
            return 0
        shape = list(shape_of(self.sources[0].meta["val"].shape, self.source_dims[0], got[0]))
        made = []
        for axis, d in enumerate(self.dims):
            rows = [self._row(axis, r) - got[0][axis][0] for r in range(*out[axis])]
            if rows != list(range(got[0][axis][1] - got[0][axis][0])):
                shape[d] = len(rows)
                made.append(math.prod(shape) * self.itemsize)
        further = any(any(pad) for d, pad in enumerate(self.pads) if d not in self.dims)
        if not further:
            made = made[:-1]
        return max(made, default=0) if len(made) < 2 else max(a + b for a, b in zip(made, made[1:], strict=False))


class PixelShuffle(Local):
    """Channels become r x r pixels (`up`), or pixels become channels."""

    is_new = False  # a single pixel may be a view

    def __init__(self, node: fx.Node, dims: Sequence[int], factor: int, up: bool) -> None:
        super().__init__(node, [node.args[0]], [dims], dims)  # type: ignore[list-item]
        self.factor, self.up = factor, up
        check_spatial("a pixel shuffle", self.shape, 2, dims)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        r = self.factor if self.dims[axis] else 1
        return (start // r, -(-stop // r)) if self.up else (start * r, stop * r)

    def _made(self, got: Region) -> Region:
        """The rows that the rows `got` become."""
        return tuple(
            (a * self.factor, b * self.factor) if d else (a, b) for d, (a, b) in zip(self.dims, got, strict=True)
        )

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        r = self.factor
        if not self.up:
            return lambda x: F.pixel_unshuffle(x, r)
        crops = crops_of(self.dims, out, self._made(got[0]))
        if not crops:
            return lambda x: F.pixel_shuffle(x, r)

        def compute(x: torch.Tensor) -> torch.Tensor:
            y = F.pixel_shuffle(x, r)
            for d, start, length in crops:
                y = y.narrow(d, start, length)
            return y.clone()

        return compute

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        if not self.up or self._made(got[0]) == tuple(out):
            return 0
        return math.prod(shape_of(self.shape, self.dims, self._made(got[0]))) * self.itemsize
