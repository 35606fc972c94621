"""Elementwise ops, with broadcasting: each element of the output needs one element of each input.

Inputs that are whole (parameters, maps that exist already) are read in the same part, where they are not broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import NotLocal
from ..regions import Interval, Region
from .local import Compute, Local

aten = torch.ops.aten
# Where there is nothing to do they give back their input itself.
_MAY_BE_ITS_INPUT = {aten.to, aten.positive, aten.conj_physical}
# Elementwise ops that torch does not tag as such.
_UNTAGGED = {aten.hardswish, aten.relu6, aten.selu, aten.softplus, aten.prelu, aten.log_sigmoid, aten.to, aten._to_copy}


def is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), Tensor):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket in _UNTAGGED


def out_variant(node: fx.Node) -> Any:
    """The overload that writes into a given tensor, or None."""
    target = node.target
    name = target._overloadname  # type: ignore[union-attr]
    if isinstance(target, torch._ops.OpOverload) and not target._schema.is_mutable:
        overloads = target.overloadpacket.overloads()
        for candidate in ("out" if name == "default" else f"{name}_out", "out"):
            if candidate in overloads and _same_arguments(target, getattr(target.overloadpacket, candidate)):
                return getattr(target.overloadpacket, candidate)
    return None


def _same_arguments(plain: Any, out: Any) -> bool:
    ours = [(a.name, str(a.type)) for a in plain._schema.arguments]
    return ours == [(a.name, str(a.type)) for a in out._schema.arguments if a.name != "out"]


Placed = tuple[list[int], list[fx.Node], list[list[int]], list[fx.Node]]


def _placed(node: fx.Node, sources: Sequence[fx.Node], source_dims: Sequence[Sequence[int]]) -> Placed:
    """The dimension of each axis in the output, the inputs read in parts, theirs, and the inputs read whole.

    Dimensions are counted from the last, as in broadcasting.
    """
    value = node.meta["val"]
    rank = value.dim()
    first = [d + rank - sources[0].meta["val"].dim() for d in source_dims[0]]
    sliced, dims, others = list(sources), [list(d) for d in source_dims], []
    for x, ds in zip(sources, source_dims, strict=True):
        if [d + rank - x.meta["val"].dim() for d in ds] != first:
            raise NotLocal("its inputs have their rows in different dimensions")
    per_channel = node.args[1] if node.target is aten.prelu.default else None
    if per_channel is not None and (per_channel in sources or 1 in first):
        raise NotLocal("a PReLU along its channels")
    for x in node.all_input_nodes:
        if x in sources or not isinstance(x.meta.get("val"), Tensor):
            continue
        shape = x.meta["val"].shape
        own = [d - rank + len(shape) for d in first]
        spread = [d < 0 or shape[d] == 1 != value.shape[f] for d, f in zip(own, first, strict=True)]
        if x is per_channel or all(spread):
            others.append(x)
        elif any(spread):
            raise NotLocal("one of its inputs is broadcast along some of the sliced axes only")
        else:
            sliced.append(x)
            dims.append(own)
    return first, sliced, dims, others


class Pointwise(Local):
    """Any elementwise op, called as it stands in the graph."""

    def __init__(self, node: fx.Node, sources: Sequence[fx.Node], source_dims: Sequence[Sequence[int]]) -> None:
        self.is_new = node.target.overloadpacket not in _MAY_BE_ITS_INPUT  # type: ignore[union-attr]
        first, sliced, dims, others = _placed(node, sources, source_dims)
        super().__init__(node, sliced, dims, first, others)
        for sizes in self.source_sizes:
            if sizes != tuple(self.shape[d] for d in first):
                raise NotLocal("one of its sliced inputs is broadcast along the rows")
        self._order = self._argument_order()
        self._out = out_variant(node)
        values = [x.meta["val"] for x in (*self.sources, *self.others)]
        same_dtype = all(v.dtype == node.meta["val"].dtype for v in values if v.dim())
        self.takes_out = self._out is not None and same_dtype
        self.in_place = self.takes_out

    def _argument_order(self) -> list[tuple[int, Any]]:
        """For each argument, which tensor it is, or (-1, its value)."""
        place = {n: i for i, n in enumerate((*self.sources, *self.others))}
        node, order = self.node, []
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            raise NotLocal("it takes a tensor by keyword")
        for argument in node.args:
            if isinstance(argument, (list, tuple)) and any(isinstance(a, fx.Node) for a in argument):
                raise NotLocal("it takes a list of tensors")
            if isinstance(argument, fx.Node) and argument not in place:
                raise NotLocal("it depends on a size")
            order.append((place[argument], None) if isinstance(argument, fx.Node) else (-1, argument))
        return order

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        target: Any = self.node.target
        kwargs: dict[str, Any] = dict(self.node.kwargs)
        order, into = self._order, self._out
        into = _gelu_into if target is aten.gelu.default else into
        if fast := _simple(self.node, order):
            plain, writing = fast
            return lambda *tensors, out=None: plain(*tensors) if out is None else writing(*tensors, out)

        def compute(*tensors: Tensor, out: Tensor | None = None) -> Tensor:
            args = [tensors[i] if i >= 0 else value for i, value in order]
            return target(*args, **kwargs) if out is None else into(*args, **kwargs, out=out)

        return compute


def _gelu_into(x: Tensor, *, out: Tensor, **kwargs: Any) -> Tensor:
    """torch's GELU on the CPU writes by the strides of x, whatever those of `out` are."""
    if out.stride() == x.stride():
        return aten.gelu.out(x, **kwargs, out=out)
    return out.copy_(aten.gelu.default(x, **kwargs))


def _simple(node: fx.Node, order: Sequence[tuple[int, Any]]) -> tuple[Any, Any] | None:
    """Faster callables than the overloads for what CNNs call most."""
    values = [value for i, value in order if i < 0]
    tensors = [i for i, _ in order if i >= 0]
    if node.kwargs:
        return None
    if node.target is aten.relu.default:
        return torch.relu, lambda x, out: torch.clamp_min(x, 0, out=out)
    if node.target is aten.hardtanh.default and all(isinstance(v, (int, float)) for v in values):
        low, high = (values + [-1.0, 1.0])[:2] if len(values) != 1 else (values[0], 1.0)
        return lambda x: torch.clamp(x, low, high), lambda x, out: torch.clamp(x, low, high, out=out)
    if node.target is aten.add.Tensor and tensors == [0, 1] and not values:
        return torch.add, lambda a, b, out: torch.add(a, b, out=out)
    if node.target is aten.mul.Tensor and tensors == [0, 1] and not values:
        return torch.mul, lambda a, b, out: torch.mul(a, b, out=out)
    return None


class BatchNorm(Local):
    """Batch norm in evaluation: a multiplication and an addition per channel."""

    def __init__(self, node: fx.Node, dims: Sequence[int]) -> None:
        x = node.args[0]
        if node.args[5] or any(n is None for n in node.args[3:5]):
            raise NotLocal("a batch norm that takes the statistics of its input (training mode)")
        if 1 in dims:
            raise NotLocal("a batch norm along its channels")
        others = [n for n in node.args[1:5] if isinstance(n, fx.Node)]
        super().__init__(node, [x], [dims], dims, others)  # type: ignore[list-item]
        self._has = [isinstance(n, fx.Node) for n in node.args[1:3]]
        self._eps: float = node.args[7]  # type: ignore[assignment]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        eps, (has_weight, has_bias) = self._eps, self._has

        def compute(x: Tensor, *tensors: Tensor) -> Tensor:
            *affine, mean, var = tensors
            weight, bias = affine[0] if has_weight else None, affine[-1] if has_bias else None
            return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)

        return compute
