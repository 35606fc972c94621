"""Ops computed whole, as they stand in the graph; elementwise ones over an input that nothing reads any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from .program import Run, Slots
from .rules.convolution import convolution
from .rules.pointwise import is_pointwise, out_variant

Fetch = Callable[[Slots], Any]


def calling(node: fx.Node, slot: Callable[[fx.Node], int], into: int | None = None) -> Run:
    """`node.target(*args)`; with `into`, the tensor in that slot takes the result."""
    fetches = [_fetch(argument, slot) for argument in node.args]
    kwargs = {name: _fetch(argument, slot) for name, argument in node.kwargs.items()}
    target: Any = node.target if into is None else out_variant(node)
    if "merged_pads" in node.meta:
        target = convolution(node, ()).bind((), ((),))
        fetches = [fetch for fetch, a in zip(fetches[:3], node.args, strict=False) if isinstance(a, fx.Node)]

    def run(env: Slots) -> Any:
        args = [fetch(env) for fetch in fetches]
        named = {name: fetch(env) for name, fetch in kwargs.items()}
        return target(*args, **named) if into is None else target(*args, **named, out=env[into])

    return run


def _fetch(argument: Any, slot: Callable[[fx.Node], int]) -> Fetch:
    if isinstance(argument, fx.Node):
        place = slot(argument)
        return lambda env: env[place]
    if isinstance(argument, (list, tuple)) and any(isinstance(a, fx.Node) for a in argument):
        parts = [_fetch(a, slot) for a in argument]
        return lambda env: [part(env) for part in parts]
    return lambda env: argument


class Storages:
    """Which values of a graph share a storage, and who reads it last."""

    def __init__(self, order: dict[fx.Node, int], outputs: set[fx.Node]) -> None:
        """`order` numbers what runs; a value's storage is read last when the last of its sharers is."""
        self._order = order
        self._sharers: dict[int, list[fx.Node]] = {}
        self._outputs = outputs
        for node in next(iter(order)).graph.nodes if order else ():
            for tensor in tensors_of(node.meta.get("val")):
                self._sharers.setdefault(storage_of(tensor), []).append(node)

    def is_free_after(self, value: fx.Node, reader: fx.Node) -> bool:
        """Whether `reader` is the last to read the storage of `value`, which was made by an op."""
        now = self._order[reader]
        for sharer in self._sharers[storage_of(value.meta["val"])]:
            if sharer.op == "placeholder" or sharer in self._outputs:
                return False
            if any(self._order.get(user, now) > now for user in sharer.users):
                return False
            if self._order.get(sharer, -1) > now:
                return False
        return True

    def dies_before(self, value: fx.Node, place: int) -> bool:
        """Whether `value` has a storage to itself that nothing reads from the op number `place` on."""
        sharers = self._sharers.get(storage_of(value.meta["val"]), [])
        if sharers != [value] or value.op == "placeholder" or value in self._outputs:
            return False
        return all(self._order.get(user, place) < place for user in value.users)


def overwritten(node: fx.Node, storages: Storages) -> fx.Node | None:
    """The input of an elementwise op that its result may overwrite, or None."""
    value: Any = node.meta.get("val")
    if not is_pointwise(node) or out_variant(node) is None or node.kwargs:
        return None
    tensors = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if any(t.dtype != value.dtype for t in tensors if t.dim()):
        return None
    for source in node.all_input_nodes:
        given: Any = source.meta.get("val")
        alike = isinstance(given, Tensor) and (given.shape, given.stride()) == (value.shape, value.stride())
        if alike and given.is_contiguous() and storages.is_free_after(source, node):
            return source
    return None


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, (tuple, list)) else []


def storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
