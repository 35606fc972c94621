"""A traced graph for one set of input shapes, rewritten so that more of it can be computed part by part.

Shapes are concrete from here on. A group or instance norm becomes its moments and a multiplication, zero padding
becomes part of the convolution behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .errors import CannotTrace
from .rules.statistics import channel_moments, scale_channels
from .tracing import Traced, where

aten = torch.ops.aten


@dataclass
class Lowered:
    """The graph for one set of input shapes.

    Attributes:
        graph: its nodes have `meta["val"]`, a fake tensor, a number, or a tuple of them, and `meta["macs"]`.
        nodes: what is computed, in order.
        inputs: the placeholders of the tensor leaves of the call, by the leaf's place.
        tensors: parameters and buffers that are read, by placeholder; their qualified names.
        constants: tensors that the forward made itself.
        outputs: the leaves of the output: nodes, and what is no tensor.
        mode: the fake tensors' mode.
    """

    graph: fx.Graph
    nodes: list[fx.Node]
    inputs: dict[int, fx.Node]
    tensors: dict[fx.Node, str]
    constants: dict[fx.Node, Tensor]
    outputs: list[Any]
    mode: FakeTensorMode


def lower(traced: Traced, module: nn.Module, leaves: Sequence[Any]) -> Lowered:
    """`traced` for call arguments `leaves`, of which only shape, dtype and device matter.

    Raises:
        CannotTrace: the ops do not fit these shapes.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(traced.graph, copied)
    graph.output(result)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    given = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    inputs = {i: copied[node] for i, node in enumerate(traced.inputs) if node is not None and node in copied}
    tensors = {copied[node]: name for node, name in traced.tensors.items() if node.users}
    constants = {copied[node]: value for node, value in traced.constants.items() if node.users}
    values: dict[fx.Node, Any] = {node: _fake(mode, leaves[i]) for i, node in inputs.items()}
    values |= {node: _fake(mode, given[name]) for node, name in tensors.items()}
    values |= {node: _fake(mode, value) for node, value in constants.items()}
    _propagate(graph, mode, values)
    for node in (*tensors, *constants):
        node.meta["is_fixed"] = True
    for node in list(graph.nodes):
        _rewrite(graph, node, mode)
    graph.eliminate_dead_code()
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    outputs = list(next(reversed(graph.nodes)).args[0])
    return Lowered(graph, nodes, inputs, tensors, constants, outputs, mode)


def _fake(mode: FakeTensorMode, x: Tensor) -> Tensor:
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _propagate(graph: fx.Graph, mode: FakeTensorMode, values: dict[fx.Node, Any]) -> None:
    """Give every node its value and its multiply-accumulates; numbers now stand in the arguments as numbers."""
    with mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        for node in list(graph.nodes):
            before = counter.get_total_flops()
            if node.op == "output":
                _inline_numbers(node, values)
                continue
            if node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)
                except Exception as error:
                    reason = str(error).strip().partition("\n")[0]
                    raise CannotTrace(f"its graph does not fit these shapes, at {where(node)}: {reason}") from error
                _inline_numbers(node, values)
            stack, macs = node.meta.get("nn_module_stack"), counter.get_total_flops() // 2 - before // 2
            node.meta = {"nn_module_stack": stack, "val": values.get(node), "macs": macs}


def _inline_numbers(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    def number(n: fx.Node) -> Any:
        value = values.get(n)
        return value if isinstance(value, (int, float, bool)) else n

    node.args = fx.map_arg(node.args, number)
    node.kwargs = fx.map_arg(node.kwargs, number)


def _rewrite(graph: fx.Graph, node: fx.Node, mode: FakeTensorMode) -> None:
    if node.op != "call_function":
        return
    packet = getattr(node.target, "overloadpacket", None)
    if packet is aten.group_norm:
        x, groups, weight, bias, eps = [*node.args, *(None, None, None, None, 1e-5)[len(node.args) :]][:5]
        _as_moments(graph, node, mode, (x, weight, bias, groups, eps))
    elif packet is aten.instance_norm and node.args[5]:
        x, weight, bias = node.args[:3]
        channels = x.meta["val"].shape[1]  # type: ignore[union-attr]
        _as_moments(graph, node, mode, (x, weight, bias, channels, node.args[7]))
    elif packet in (aten.conv1d, aten.conv2d, aten.conv3d):
        _merge_padding(node)


def _as_moments(graph: fx.Graph, node: fx.Node, mode: FakeTensorMode, args: tuple[Any, ...]) -> None:
    x = args[0]
    if x.meta["val"].dim() < 3:
        return
    with graph.inserting_before(node):
        moments = graph.call_function(channel_moments, args)
        scaled = graph.call_function(scale_channels, (x, moments))
    for new in (moments, scaled):
        with mode, torch.no_grad():
            values = fx.map_arg(new.args, lambda n: n.meta["val"])
            new.meta = dict(node.meta) | {"val": new.target(*values)}  # type: ignore[operator]
    node.replace_all_uses_with(scaled)
    graph.erase_node(node)


def _merge_padding(node: fx.Node) -> None:
    """Zeros added before a convolution, for it alone, are the convolution's own padding."""
    pad = node.args[0]
    if not isinstance(pad, fx.Node) or pad.target is not aten.pad.default or len(pad.users) > 1:
        return
    source, amounts, *rest = pad.args
    mode, value = [*rest, "constant", None][:2] if len(rest) < 2 else rest
    n = node.meta["val"].dim() - 2
    if mode != "constant" or value not in (None, 0, 0.0) or min(amounts) < 0 or any(amounts[2 * n :]):  # type: ignore[index, arg-type]
        return
    amounts = [*amounts[: 2 * n], *[0] * (2 * n - len(amounts))]  # type: ignore[index, arg-type, misc]
    pads: list[Any] = [(amounts[2 * i], amounts[2 * i + 1]) for i in reversed(range(n))]
    kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    # Without a batch, n is too small; and windows that lie in the padding alone have no rule.
    if len(kernel) != n or any(max(pair) > k - 1 for pair, k in zip(pads, kernel, strict=True)):
        return
    node.meta["merged_pads"] = pads
    node.replace_input_with(pad, source)  # type: ignore[arg-type]
