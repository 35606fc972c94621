"""Ops that work within each pixel, over dimensions that are not sliced: linear layers, norms over channels, softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from ..errors import NotLocal
from ..regions import Interval, Region
from .local import Compute, Local


class WithinRows(Local):
    """An op that is the same for every row, called as it stands in the graph; `over` are the dimensions it mixes."""

    is_new = False

    def __init__(
        self,
        node: fx.Node,
        source_dims: Sequence[int],
        dims: Sequence[int],
        over: Sequence[int],
        *,
        macs_per_element: int = 0,
        extra_bytes_per_element: int = 0,
    ) -> None:
        x = node.args[0]
        others = [n for n in node.args[1:] if isinstance(n, fx.Node)]
        super().__init__(node, [x], [source_dims], dims, others)  # type: ignore[list-item]
        rank = x.meta["val"].dim()  # type: ignore[union-attr]
        if any(d % rank in source_dims for d in over):
            raise NotLocal("it mixes the rows")
        self._macs = macs_per_element
        self.extra_bytes_per_element = extra_bytes_per_element

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        target: Any = self.node.target
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        places = [i for i, a in enumerate(args) if isinstance(a, fx.Node)]

        def compute(*tensors: Any) -> Any:
            filled = list(args)
            for i, tensor in zip(places, tensors, strict=True):
                filled[i] = tensor
            return target(*filled, **kwargs)

        return compute

    def macs(self, out: Region, got: Sequence[Region]) -> int:
        return math.prod(self.part_shape(out)) * self._macs
