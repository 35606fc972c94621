"""A module's forward as a graph of functional ATen ops, whose parameters are read from the live module.

x is (B, C, *spatial): (B, C, H, W) for images, (B, C, T, H, W) for videos.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .errors import CannotTrace
from .plainly import untouched

aten = torch.ops.aten

# What does nothing in evaluation, or nothing that an executor without autograd needs.
_IDENTITIES = (
    *(aten.dropout, aten.dropout_, aten.feature_dropout, aten.alpha_dropout, aten.alpha_dropout_),
    *(aten.alias, aten.detach, aten.detach_, aten.lift_fresh, aten.lift_fresh_copy),
)
_CHECKS = (aten._assert_tensor_metadata, aten._assert_scalar, aten.sym_constrain_range_for_size)


@dataclass
class Traced:
    """The graph of one forward.

    Attributes:
        graph: placeholders for the tensors below, then ATen calls without mutation, then the output.
        tensors: for each placeholder of a parameter or buffer, its qualified name in the module.
        constants: for each placeholder of a tensor that the forward made, that tensor.
        inputs: the placeholders of the call's arguments, in the order of their leaves; None for one that is no tensor.
        in_spec: the structure of (args, kwargs).
        out_spec: the structure of what the forward returns.
        batch_varies: whether the first dimension of the inputs may have another size than in the trace.
    """

    graph: fx.Graph
    tensors: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    inputs: list[fx.Node | None]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    batch_varies: bool

    @property
    def output(self) -> Sequence[Any]:
        """The leaves of the output: nodes, and what is no tensor."""
        return self.output_node.args[0]  # type: ignore[return-value]

    @property
    def output_node(self) -> fx.Node:
        return next(reversed(self.graph.nodes))

    def calls(self) -> Iterator[fx.Node]:
        return (node for node in self.graph.nodes if node.op == "call_function")


def trace(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Traced:
    """Trace `module` in evaluation on tensors of the shapes of these; their values, if any, are not looked at.

    Raises:
        CannotTrace: torch.export cannot, for instance because the control flow depends on values.
    """
    args, keywords = call = pytree.tree_map_only(Tensor, _twin, (args, dict(kwargs)))
    batches = [x.shape[0] for x in pytree.tree_leaves(call) if has_batch(x)]
    if batches and min(batches) > 1:  # a trace for one holds for one only, and the other way round
        dynamic = pytree.tree_map(lambda x: {0: torch.export.Dim.AUTO} if has_batch(x) else None, call)
        try:
            return _as_traced(module, _export(module, args, keywords, dynamic))
        except CannotTrace:
            pass
    return _as_traced(module, _export(module, args, keywords, None))


def _twin(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def has_batch(x: Any) -> bool:
    """Whether the first dimension of an argument is taken for a batch."""
    return isinstance(x, Tensor) and x.dim() >= 3


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any) -> Any:
    shapes = None
    if dynamic is not None:
        import inspect

        names = list(inspect.signature(module.forward).parameters)
        shapes = dict(zip(names, dynamic[0], strict=False)) | dynamic[1]
        if len(names) < len(args) or not set(kwargs) <= set(names):
            shapes = (*dynamic[0], *dynamic[1].values())
    try:
        with untouched(module) as changed, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CannotTrace(f"torch.export cannot trace {type(module).__name__}: {reason}") from error
    if changed:  # a plan would not do that
        raise CannotTrace(f"the forward of {type(module).__name__} keeps something of each call in {changed[0]}")
    return exported


def _as_traced(module: nn.Module, exported: Any) -> Traced:
    from torch.export.graph_signature import InputKind

    if exported.graph_signature.buffers_to_mutate:
        raise CannotTrace(f"{type(module).__name__} changes a buffer in its forward")
    graph: fx.Graph = exported.graph
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    tensors: dict[fx.Node, str] = {}
    constants: dict[fx.Node, Tensor] = {}
    inputs: list[fx.Node | None] = []
    for spec in exported.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            tensors[node] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[node] = exported.constants[spec.target]
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(node if isinstance(node.meta.get("val"), Tensor) else None)
        else:
            raise CannotTrace(f"{type(module).__name__} takes an input of the kind {spec.kind.name}")
    spec = exported.call_spec
    traced = Traced(graph, tensors, constants, inputs, spec.in_spec, spec.out_spec, _batch_varies(inputs))
    _simplify(traced)
    return traced


def _batch_varies(inputs: Sequence[fx.Node | None]) -> bool:
    """Whether the graph holds for all batches of two and more: the forward asked nothing about the size."""
    sizes = [node.meta["val"].shape[0] for node in inputs if node is not None and has_batch(node.meta["val"])]
    symbols = {str(size) for size in sizes if isinstance(size, torch.SymInt)}
    return bool(sizes) and len(symbols) == len(sizes) and not any(size.node.shape_env.guards for size in sizes)


def _simplify(traced: Traced) -> None:
    """Without mutation, tuples and what does nothing: then the order of the ops is only that of their data."""
    for node in list(traced.calls()):
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _CHECKS:
            traced.graph.erase_node(node)
        elif _is_in_place(node.target) and packet not in _IDENTITIES:
            _make_functional(traced, node)
        elif node.target is operator.getitem:
            _take_part(traced.graph, node)
    # Only now, since a copy may have been what was written into.
    for node in list(traced.calls()):
        packet = getattr(node.target, "overloadpacket", None)
        if (packet in _IDENTITIES and not _drops_out(node)) or _is_empty_pad(node):
            _replace(node, node.args[0])
        elif packet in (aten.clone, aten.contiguous):
            _drop_copy(node)
    traced.graph.eliminate_dead_code()


def _drops_out(node: fx.Node) -> bool:
    """Whether it is a dropout in training: some forwards never switch it off."""
    return len(node.args) > 2 and bool(node.args[2])


def _replace(node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _drop_copy(node: fx.Node) -> None:
    """A copy in the same layout is its source, as nothing is mutated before it is returned."""
    source = node.args[0]
    new, old = node.meta["val"], source.meta["val"]  # type: ignore[union-attr]
    if new.stride() == old.stride() and not any(user.op == "output" for user in node.users):
        _replace(node, source)


def _is_empty_pad(node: fx.Node) -> bool:
    return node.target is aten.pad.default and not any(node.args[1])  # type: ignore[arg-type]


def _is_in_place(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


def _make_functional(traced: Traced, node: fx.Node) -> None:
    """`relu_(x)` becomes `y = relu(x)`, and whoever reads x afterwards reads y."""
    schema = node.target._schema  # type: ignore[union-attr]
    name = schema.name.partition("::")[2]
    functional = getattr(getattr(aten, name.removesuffix("_"), None), node.target._overloadname, None)  # type: ignore[union-attr]
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    source = node.args[0]
    if not name.endswith("_") or functional is None or len(written) != 1 or not isinstance(source, fx.Node):
        raise CannotTrace(f"its forward writes in place by {node.target}, at {where(node)}")
    order = {n: i for i, n in enumerate(traced.graph.nodes)}
    if _is_read_through_another(source, node, order):
        raise CannotTrace(f"its forward changes {source.name} in place, which is read elsewhere, at {where(node)}")
    made = functional(*fx.map_arg(node.args, _value), **fx.map_arg(node.kwargs, _value))
    node.target, written_one = functional, node
    if made.dtype != source.meta["val"].dtype:  # in place, the result is rounded to what was there
        with traced.graph.inserting_after(node):
            written_one = traced.graph.call_function(aten.to.dtype, (node, source.meta["val"].dtype))
        written_one.meta, node.meta = dict(node.meta), dict(node.meta) | {"val": made}
        node.replace_all_uses_with(written_one, delete_user_cb=lambda user: user is not written_one)
    source.replace_all_uses_with(written_one, delete_user_cb=lambda user: order.get(user, 0) > order[node])


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def _is_read_through_another(source: fx.Node, node: fx.Node, order: Mapping[fx.Node, int]) -> bool:
    """Whether what `node` writes into `source` is seen by whoever holds an input, or another view of it, afterwards."""
    storage = _storage(source)
    for other in order:
        if other is node:
            break  # what comes after it reads what it makes
        if _storage(other) != storage:
            continue
        if other.op == "placeholder" or (other is not source and any(order[u] > order[node] for u in other.users)):
            return True
    return False


def _storage(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    try:
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
    except NotImplementedError as error:  # of a tensor within torch.func.vmap
        raise CannotTrace(f"{node.name} has no memory of its own: {error}") from error


def _take_part(graph: fx.Graph, node: fx.Node) -> None:
    """`chunk(x, n)[i]` and its kin become one slice each."""
    source, index = node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return
    packet = getattr(source.target, "overloadpacket", None)
    if packet not in (aten.chunk, aten.split, aten.split_with_sizes, aten.unbind, aten.tensor_split):
        return
    x = source.args[0]
    dim = source.kwargs.get("dim", source.args[2 if packet is not aten.unbind else 1 :] or 0)
    dim = dim[0] if isinstance(dim, (tuple, list)) else dim
    parts = source.meta["val"]
    with graph.inserting_before(node):
        if packet is aten.unbind:
            part = graph.call_function(aten.select.int, (x, dim, index))
        else:
            start = sum(p.shape[dim] for p in parts[:index])
            part = graph.call_function(aten.slice.Tensor, (x, dim, start, start + parts[index].shape[dim]))
    part.meta = dict(node.meta)
    _replace(node, part)


def where(node: fx.Node) -> str:
    """The qualified name of the innermost module that `node` belongs to, for a message."""
    return module_of(node) or "the model itself"


def module_of(node: fx.Node) -> str:
    """The qualified name, in the traced module, of the innermost module whose forward has the node's op."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed([name for name, _ in stack.values()]), "")


def is_within(name: str, module: str) -> bool:
    """Whether the module `name` is `module` or lies in it."""
    return not module or name == module or name.startswith(f"{module}.")


def op_name(node: fx.Node) -> str:
    """The op and the module it belongs to, for tables and messages."""
    packet = getattr(node.target, "overloadpacket", node.target)
    op = getattr(packet, "__name__", str(packet))
    return f"{module_of(node)} ({op})" if module_of(node) else op


def read(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where the parameter or buffer `name` of `module` is kept: a dictionary and its key."""
    path, _, key = name.rpartition(".")
    owner = module.get_submodule(path)
    return (owner._parameters if key in owner._parameters else owner._buffers), key


def once_each(module: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each place: what a shared module holds has several, and would not be put back if set twice."""
    places: dict[tuple[int, str], str] = {}
    for name in given:
        holder, key = read(module, name)
        places.setdefault((id(holder), key), name)
    return {name: given[name] for name in places.values()}
