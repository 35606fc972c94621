"""Recognizing a feed-forward block by what its forward does: linear(s) -> activation [-> product] -> linear.

The forward is traced once with `torch.fx`, every child as one node. A block matches if its graph holds the nodes below
and nothing else:

    pre_1 [, pre_2] = linear children of the one input x, or the two halves of one child's output ("fused")
    h = act(pre) or act(gate) * up
    h = dropout child of h, optional;  y = down(h), a linear child;  y = dropout child of y, optional

Nothing is read but the graph: no class of any package is known here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..ops.activation import Activation
from .activation_kind import activation_of, activation_of_function
from .converted import original_class
from .linear import is_linear

_PRODUCTS = {operator.mul, torch.mul, "mul"}
_CHUNKS = {torch.chunk, "chunk"}


@dataclass(frozen=True)
class MLPGraph:
    """What a block computes, by the names of its children.

    Attributes:
        linears: the linears that read x, in the order in which they are called: one or two.
        down: the linear that reads h.
        activation: which function.
        gate: index of the activated tensor among the linears' outputs, or of the half if fused.
        gated: whether h is a product.
        fused: whether gate and up are the halves of one linear's output.
        act: the activation's child and its class, or None for a function.
        dropout: dropout child between h and down, or None.
        trailing: dropout child after down, or None.
    """

    linears: tuple[str, ...]
    down: str
    activation: Activation
    gate: int = 0
    gated: bool = False
    fused: bool = False
    act: tuple[str, str] | None = None
    dropout: str | None = None
    trailing: str | None = None

    @property
    def others(self) -> tuple[str, ...]:
        """The children that are no linears."""
        return tuple(name for name in (self.act[0] if self.act else None, self.dropout, self.trailing) if name)


class NoMatch(Exception):
    """Why a forward is not that of a feed-forward block, in words."""


def reads_like_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear or an adapter around one."""
    base = getattr(module, "base_layer", None)
    return is_linear(module) or (isinstance(base, nn.Module) and is_linear(base))


def in_features(linear: nn.Module) -> int:
    """The width of what a linear, or an adapter around one, takes."""
    linear = getattr(linear, "base_layer", linear)
    return int(linear.in_features if hasattr(linear, "in_features") else linear.nx)  # type: ignore[arg-type]


def out_features(linear: nn.Module) -> int:
    """The width of what a linear, or an adapter around one, gives."""
    linear = getattr(linear, "base_layer", linear)
    return int(linear.out_features if hasattr(linear, "out_features") else linear.nf)  # type: ignore[arg-type]


def looks_like_mlp(module: nn.Module) -> bool:
    """Whether `module`, by its children, may be a feed-forward block."""
    if is_linear(module) or hasattr(module, "base_layer"):
        return False
    children = [child for child in module._modules.values() if child is not None]
    linears = [child for child in children if reads_like_linear(child)]
    others = [child for child in children if not reads_like_linear(child)]
    simple = all(isinstance(m, nn.Dropout) or activation_of(m) is not None for m in others)
    own = module._parameters or module._buffers
    fits = len(linears) in (2, 3) and any(map(_feeds, linears[:-1], linears[1:]))
    if not (fits and simple and not own and _required_inputs(original_class(module)) == 1):
        return False
    named = any(not isinstance(m, nn.Dropout) for m in others)
    widens = any(in_features(linear) != out_features(linear) for linear in linears)
    # Without either, queries, keys and values of attention have the same children: only the forward tells.
    return named or widens or _matches(module)


def _feeds(first: nn.Module, second: nn.Module) -> bool:
    """Whether `second` is as wide as what `first` gives, or as half of it."""
    return in_features(second) in (out_features(first), out_features(first) / 2)


def mlp_graph(module: nn.Module) -> MLPGraph:
    """The graph of `module`'s original forward.

    Raises:
        NoMatch: it computes something else, or cannot be traced.
    """
    cls = original_class(module)
    stand_in_class: type[nn.Module] = type(cls.__name__, (cls,), {"forward": lambda self, x: cls.forward(self, x)})
    stand_in = stand_in_class.__new__(stand_in_class)
    stand_in.__dict__.update(module.__dict__)
    try:
        graph = _ChildTracer().trace(stand_in)
    except Exception as error:  # whatever its forward does with a proxy
        what = str(error).partition(". ")[0]
        raise NoMatch(f"its forward cannot be traced ({type(error).__name__}: {what})") from None
    return _Parser(graph, module).parse()


def _matches(module: nn.Module) -> bool:
    try:
        mlp_graph(module)
    except NoMatch:
        return False
    return True


def _required_inputs(cls: type[nn.Module]) -> int:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required)


class _ChildTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Parser:
    """Reads a graph backwards from its output; every node must be used exactly as a block uses it."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self.nodes = list(graph.nodes)
        self.module = module
        self.used: set[fx.Node] = set()

    def parse(self) -> MLPGraph:
        x, result = self.nodes[0], self.nodes[-1].args[0]
        trailing, node = self._dropout(result)
        down, node = self._linear(node)
        dropout, node = self._dropout(node)
        factors = self._factors(node)
        acts = [i for i, factor in enumerate(factors) if self._activation(factor) is not None]
        if len(acts) != 1:
            raise NoMatch(f"what {down} reads is not an activation, nor a product with one")
        activation, act, gate = self._take_activation(factors[acts[0]])
        pre = [gate, *(factor for i, factor in enumerate(factors) if i != acts[0])]
        fused = len(pre) == 2 and self._is_call(pre[0], {operator.getitem})
        linears, gate_index = self._fused(pre, x) if fused else self._read(pre, x)
        # A parameter that is only looked at, say for its dtype, leaves a node without users.
        extra = [n for n in self.nodes[1:-1] if n not in self.used and (n.users or n.op != "get_attr")]
        if extra:
            raise NoMatch(f"its forward does more than a feed-forward block: {extra[0].format_node()}")
        return MLPGraph(linears, down, activation, gate_index, len(pre) == 2, fused, act, dropout, trailing)

    def _take(self, node: Any) -> fx.Node:
        if not isinstance(node, fx.Node):
            raise NoMatch("its output is not a single tensor made from its input")
        if len(node.users) > 1:
            raise NoMatch(f"its forward uses {node.name} more than once")
        self.used.add(node)
        return node

    def _child(self, node: Any) -> nn.Module | None:
        one_input = isinstance(node, fx.Node) and node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        return self.module.get_submodule(str(node.target)) if one_input else None

    def _dropout(self, node: Any) -> tuple[str | None, Any]:
        if isinstance(self._child(node), nn.Dropout):
            return str(self._take(node).target), node.args[0]
        return None, node

    def _linear(self, node: Any) -> tuple[str, Any]:
        child = self._child(node)
        if child is None or not reads_like_linear(child):
            raise NoMatch(f"its forward has {_text(node)} where a linear is expected")
        return str(self._take(node).target), node.args[0]

    def _factors(self, node: Any) -> list[Any]:
        if not self._is_call(node, _PRODUCTS):
            return [node]
        product = self._take(node)
        if len(product.args) != 2 or product.kwargs or not all(isinstance(a, fx.Node) for a in product.args):
            raise NoMatch("its forward multiplies by something that is no tensor made from its input")
        return list(product.args)

    def _activation(self, node: Any) -> Activation | None:
        child = self._child(node)
        if child is not None:
            return None if reads_like_linear(child) else activation_of(child)
        if isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and len(node.args) == 1:
            return activation_of_function(node.target, dict(node.kwargs))
        return None

    def _take_activation(self, node: Any) -> tuple[Activation, tuple[str, str] | None, Any]:
        activation = self._activation(node)
        assert activation is not None  # its caller has checked
        taken, child = self._take(node), self._child(node)
        act = None if child is None else (str(taken.target), original_class(child).__qualname__)
        return activation, act, taken.args[0]

    def _read(self, pre: Iterable[Any], x: fx.Node) -> tuple[tuple[str, ...], int]:
        """The linears that make the tensors `pre`, the gate first, and the gate's place in the order of calls."""
        found = []
        for node in pre:
            name, source = self._linear(node)
            if source is not x:
                raise NoMatch(f"{name} does not read the block's input")
            found.append((self.nodes.index(node), name))
        ordered = sorted(found)
        return tuple(name for _, name in ordered), ordered.index(found[0])

    def _fused(self, pre: Iterable[Any], x: fx.Node) -> tuple[tuple[str, ...], int]:
        halves: list[Any] = [self._take(node).args if self._is_call(node, {operator.getitem}) else () for node in pre]
        chunks, places = {half[0] for half in halves if half}, [half[1] for half in halves if half]
        whole = self._chunked(*chunks) if len(chunks) == 1 else None
        if whole is None or places not in ([0, 1], [1, 0]):
            raise NoMatch("its product is not that of the two halves of one tensor")
        self.used |= chunks
        name, source = self._linear(whole)
        if source is not x:
            raise NoMatch(f"{name} does not read the block's input")
        return (name,), places[0]

    def _chunked(self, node: Any) -> Any:
        """The tensor that `node` splits into two halves of its last dimension, or None."""
        if not self._is_call(node, _CHUNKS):
            return None
        given = dict(zip(("input", "chunks", "dim"), node.args, strict=False)) | dict(node.kwargs)
        return given.get("input") if (given.get("chunks"), given.get("dim")) == (2, -1) else None

    @staticmethod
    def _is_call(node: Any, targets: set[Any]) -> bool:
        return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


def _text(node: Any) -> str:
    return node.name if isinstance(node, fx.Node) else repr(node)
