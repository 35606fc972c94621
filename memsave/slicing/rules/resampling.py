"""Interpolation: every output row is a weighted sum of a few source rows.

The weights along a sliced axis are read off torch's own interpolation of an identity matrix, so every mode is exact;
the other dimensions are interpolated by torch as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import NotLocal
from ..regions import Interval, Region
from .convolution import check_spatial
from .local import Compute, Local, part_elements

aten = torch.ops.aten
MODES = {
    aten.upsample_nearest1d: "nearest",
    aten.upsample_nearest2d: "nearest",
    aten.upsample_nearest3d: "nearest",
    aten._upsample_nearest_exact1d: "nearest-exact",
    aten._upsample_nearest_exact2d: "nearest-exact",
    aten._upsample_nearest_exact3d: "nearest-exact",
    aten.upsample_linear1d: "linear",
    aten.upsample_bilinear2d: "linear",
    aten.upsample_trilinear3d: "linear",
    aten.upsample_bicubic2d: "bicubic",
    aten._upsample_bilinear2d_aa: "bilinear-aa",
    aten._upsample_bicubic2d_aa: "bicubic-aa",
}


class Taps:
    """For each output row, its source rows and their weights, padded to the same count by weights of 0."""

    def __init__(self, rows: Tensor, weights: Tensor) -> None:
        self.rows, self.weights = rows, weights  # both (size_out, taps)
        self.low, self.high = rows.amin(1).tolist(), (rows.amax(1) + 1).tolist()


@lru_cache(maxsize=64)
def taps(mode: str, size_in: int, size_out: int, align_corners: bool | None, scale: float | None) -> Taps:
    """The taps of one axis, for all modes but the nearest ones."""
    with torch.inference_mode(False), torch.no_grad():
        # In blocks of columns: an identity matrix of all of a long axis would be large.
        matrix = torch.zeros(size_out, size_in, dtype=torch.float64)
        for start in range(0, size_in, 256):
            columns = torch.arange(start, min(start + 256, size_in))
            block = torch.zeros(len(columns), 1, size_in, dtype=torch.float64)
            block[torch.arange(len(columns)), 0, columns] = 1
            matrix[:, columns] = _interpolated(block, mode, size_out, align_corners, scale).squeeze(1).T
        used = matrix != 0
        order = used.int().argsort(dim=1, descending=True, stable=True)[:, : int(used.sum(1).max())]
        weights = matrix.gather(1, order)
        return Taps(torch.where(weights != 0, order, order[:, :1]), weights)


MANY = 129  # torch takes another way, which rounds otherwise, for outputs of more than 128 rows and columns


@lru_cache(maxsize=256)
def nearest_taps(
    mode: str, size_in: int, size_out: int, scale: float | None, dtype: torch.dtype, others: tuple[int, ...]
) -> Taps:
    """The taps of one axis of a map whose other dimensions get the sizes `others`.

    Which row is the nearest can hang on the last bit of the scale, which torch rounds in the map's dtype and by its
    size; so it is asked what it does to a map of that kind.
    """
    with torch.inference_mode(False), torch.no_grad():
        rank = 1 + len(others)
        line = torch.arange(size_in, dtype=dtype).view(1, 1, size_in, *[1] * (rank - 1)).repeat(1, 2, *[1] * rank)
        sizes, scales = [size_out, *(min(n, MANY) for n in others)], [scale, *[None] * (rank - 1)]
        name = f"upsample_nearest{rank}d" if mode == "nearest" else f"_upsample_nearest_exact{rank}d"
        shown = getattr(aten, name)(line, sizes, *scales)[0, 0].reshape(size_out, -1)
        rows = shown[:, :1].long()
        return Taps(rows, torch.ones_like(rows, dtype=torch.float64))


def _interpolated(x: Tensor, mode: str, size: int, align_corners: bool | None, scale: float | None) -> Tensor:
    """x (B, 1, L) interpolated along L."""
    if mode == "linear":
        result: Tensor = aten.upsample_linear1d(x, [size], align_corners, scale)
    else:
        x4 = x.unsqueeze(-1).expand(-1, -1, -1, 2)  # (B, 1, L, 2): antialiasing of a single column goes wrong in torch
        function = {
            "bicubic": aten.upsample_bicubic2d,
            "bilinear-aa": aten._upsample_bilinear2d_aa,
            "bicubic-aa": aten._upsample_bicubic2d_aa,
        }[mode]
        result = function(x4, [size, 2], align_corners, scale, None)[..., 0]
    return result


class Interpolation(Local):
    def __init__(self, node: fx.Node, dims: Sequence[int]) -> None:
        super().__init__(node, [node.args[0]], [dims], dims)  # type: ignore[list-item]
        packet = node.target.overloadpacket  # type: ignore[union-attr]
        self.mode = MODES[packet]
        names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        self.align_corners: bool | None = given.get("align_corners")
        self.spatial = len(self.shape) - 2
        check_spatial("an interpolation", self.shape, int(packet.__name__.removesuffix("_aa")[-2]), dims)
        self.is_nearest = self.mode.startswith("nearest")
        x: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
        if not self.is_nearest and not x.is_floating_point():
            raise NotLocal("an interpolation of whole numbers")
        if self.mode.endswith("aa") and 1 in (x.shape[-1], self.shape[-1]):
            raise NotLocal("torch does not interpolate a single column with antialiasing as it does several")
        scales = given.get("scale_factors")
        if scales is None:
            of_each = {1: ["scales"], 2: ["scales_h", "scales_w"], 3: ["scales_d", "scales_h", "scales_w"]}[
                self.spatial
            ]
            scales = [given.get(name) for name in of_each]
        self.scales: list[float | None] = list(scales) if scales else [None] * self.spatial
        self._source = x
        self._packet: Any = packet
        # On GPUs torch rounds in float32 whatever the dtype.
        is_double = x.dtype is torch.float64 and x.device.type == "cpu"
        self._rounding = torch.float64 if is_double else torch.float32
        self._taps = [self._taps_of(d) if d else None for d in dims]

    def _taps_of(self, d: int) -> Taps:
        size_in, size_out, scale = int(self._source.shape[d]), self.shape[d], self.scales[d - 2]
        if not self.is_nearest:
            return taps(self.mode, size_in, size_out, self.align_corners, scale)
        others = tuple(n for e, n in enumerate(self.shape) if e >= 2 and e != d)
        return nearest_taps(self.mode, size_in, size_out, scale, self._rounding, others)

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        found = self._taps[axis]
        if found is None:
            return start, stop
        if self.is_nearest or self.mode == "linear":  # monotone
            return found.low[start], found.high[stop - 1]
        return min(found.low[start:stop]), max(found.high[start:stop])

    def _is_plain(self, out: Region, got: Region) -> bool:
        """Whether torch itself shows the rows `out` when it scales the rows `got` to their number."""
        if self.mode != "nearest":
            return False
        for axis, found in enumerate(self._taps):
            if found is not None:
                shown = found.rows[out[axis][0] : out[axis][1]] - got[axis][0]
                sizes = got[axis][1] - got[axis][0], out[axis][1] - out[axis][0]
                others = tuple(n for e, n in enumerate(self.part_shape(out)) if e >= 2 and e != self.dims[axis])
                if not torch.equal(nearest_taps(self.mode, *sizes, None, self._rounding, others).rows, shown):
                    return False
        return True

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        if self._is_plain(out, got[0]):
            size, factors = list(self.shape[2:]), list(self.scales)
            for axis, d in enumerate(self.dims):
                if d:
                    size[d - 2], factors[d - 2] = out[axis][1] - out[axis][0], None
            packet = self._packet
            return lambda x: packet(x, size, *factors)
        gathered = []
        for d in range(2, self.spatial + 2):
            scale, same = self.scales[d - 2], self.shape[d] == self._source.shape[d]
            if d not in self.dims and not (same and scale in (None, 1.0)):
                every = self._taps_of(d)
                gathered.append((d, every.rows, every.weights))
        for d, found, (start, stop), (low, _) in zip(self.dims, self._taps, out, got[0], strict=True):
            if found is not None:
                gathered.append((d, found.rows[start:stop] - low, found.weights[start:stop]))
        weighted = not self.is_nearest

        def compute(x: Tensor) -> Tensor:
            for d, rows, weights in gathered:
                x = _gather(x, d, rows, weights if weighted else None)
            return x

        return compute

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        if self._is_plain(out, got[0]):
            return 0
        narrow = part_elements(self._source.shape, self.source_dims[0], got[0])
        return narrow * self.itemsize + 2 * self.part_bytes(out)


def _gather(x: Tensor, d: int, rows: Tensor, weights: Tensor | None) -> Tensor:
    """The rows of `x` along `d` that are meant, times their weights, added up over the taps."""
    if weights is None:
        return x.index_select(d, rows[:, 0].to(x.device))
    total: Tensor | None = None
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    for tap in range(rows.shape[1]):
        weight = weights[:, tap].to(x.device, wide).view(-1, *[1] * (x.dim() - 1 - d))
        term = x.index_select(d, rows[:, tap].to(x.device)).to(wide)
        total = term.mul_(weight) if total is None else total.addcmul_(term, weight)
    assert total is not None  # every row has a tap
    return total.to(x.dtype)
