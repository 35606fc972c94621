"""From a feed-forward block to its routed form, and back to a dense one.

F hidden units; a weight that maps to them is (F, D), or (2F, D) where gate and up are one linear, and (O, F) from
them, each transposed in `Conv1D`. `order` (F,) says which unit of the original stands at each place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..converted import is_watched, original_class
from ..linear import is_linear
from ..mlp_graph import MLPGraph, NoMatch, in_features, mlp_graph, out_features
from .layout import Layout
from .module import RoutedFFN, Sizes
from .routing import Router

_NOT_OF_THE_BLOCK = frozenset(nn.Module().__dict__) | {"_memsave", "_memsave_parts"}
_HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)


class Fitted(NamedTuple):
    """What calibration found for one block: the order of its units (F,), the router's weight (G, D) and bias (G,)."""

    order: Tensor
    weight: Tensor
    bias: Tensor


class _Plain(NamedTuple):
    """What the original module was besides its tensors and children; for a linear, also its name in the block."""

    cls: type[nn.Module]
    attributes: dict[str, Any]
    trained: dict[str, bool]
    hooks: dict[str, Any]

    @staticmethod
    def of(module: nn.Module) -> _Plain:
        attributes = {k: v for k, v in module.__dict__.items() if k not in _NOT_OF_THE_BLOCK}
        trained = {name: p.requires_grad for name, p in module._parameters.items() if p is not None}
        return _Plain(original_class(module), attributes, trained, {name: module.__dict__[name] for name in _HOOKS})

    def made(self) -> nn.Module:
        """A module of that class without parameters and children."""
        module = self.cls.__new__(self.cls)
        nn.Module.__init__(module)
        module.__dict__.update(self.attributes | self.hooks)
        return module


class Dense(NamedTuple):
    """How to make the dense block again.

    Attributes:
        block: what it was itself.
        children: its children in their order: by name, what each linear and activation was, and of linears the name
            that they have in the layout. A dropout child is itself in the routed block, and stands here as None.
    """

    block: _Plain
    children: dict[str, tuple[_Plain | None, str | None]]


def roles(graph: MLPGraph) -> dict[str, str]:
    """The names of the block's linears by those that `Layout` gives them."""
    if graph.fused:
        return {"gate_up": graph.linears[0], "down": graph.down}
    if graph.gated:
        gate, up = graph.linears[graph.gate], graph.linears[1 - graph.gate]
        return {"gate": gate, "up": up, "down": graph.down}
    return {"up": graph.linears[0], "down": graph.down}


def why_not_routed(module: nn.Module, blocks: int) -> str | None:
    """Say why a block that looks like a feed-forward block cannot be routed, or return None."""
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which the routed block would not run"
    try:
        graph = mlp_graph(module)
    except NoMatch as error:
        return str(error)
    linears = {name: module.get_submodule(name) for name in roles(graph).values()}
    for name, linear in linears.items():
        if not is_linear(linear):
            return (
                f"an adapter ({type(linear).__name__}) is around its {name}, which a routed block would lose; convert "
                "before adding adapters elsewhere, and use lora_rank for those of the block"
            )
        if reason := _why_not_linear(name, linear):
            return reason
    for name in graph.others:
        if is_watched(module.get_submodule(name)):
            return f"hooks watch its {name}, which a routed block does not call as it was"
    return _why_not_sizes(module, graph, blocks) or _why_not_alike(linears)


def _why_not_linear(name: str, linear: nn.Module) -> str | None:
    weight = linear.weight
    if getattr(linear, "parametrizations", None):
        return f"its {name} is parametrized (torch.nn.utils.parametrize), and its weight is made anew at each access"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"the weight of its {name} is a {type(weight).__name__} (quantized or sharded), which cannot be divided"
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        return f"the weight of its {name} is {weight.dtype}; expected a floating-point one"
    if is_watched(linear):
        return f"hooks watch its {name}, which a routed block does not call"
    return None


def _why_not_sizes(module: nn.Module, graph: MLPGraph, blocks: int) -> str | None:
    units = in_features(module.get_submodule(graph.down))
    if units % blocks:
        return f"its {units} hidden units cannot be divided into {blocks} equal blocks"
    dropout = None if graph.dropout is None else module.get_submodule(graph.dropout)
    if isinstance(dropout, nn.Dropout) and dropout.p > 0:
        return (
            f"its {graph.dropout} drops hidden units (p = {dropout.p}), which a routed block does not; set its p to 0"
        )
    return None


def _why_not_alike(linears: Mapping[str, nn.Module]) -> str | None:
    tensors = [t for linear in linears.values() for t in linear._parameters.values() if t is not None]
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        return f"its weights are of several kinds ({found}); expected one dtype on one device"
    return None


def layout_of(module: nn.Module, blocks: int, active: int, scaling: float = 1.0) -> Layout:
    """The structure of a plain block, divided into `blocks`."""
    graph = mlp_graph(module)
    named = roles(graph)
    transposed = tuple(
        role for role, name in named.items() if not issubclass(original_class(module.get_submodule(name)), nn.Linear)
    )
    linears = tuple(role for role in named if role != "down")
    gate = graph.gate if graph.fused else 0
    return Layout(blocks, active, graph.activation, linears, transposed, gate, scaling)


def empty_routed_ffn(
    module: nn.Module, blocks: int, active: int, balance: float, lora_rank: int, lora_alpha: float, *, permuted: bool
) -> RoutedFFN:
    """A `RoutedFFN` in the place of `module`: its weights where they need not be moved, its flags and hooks.

    Args: see `RoutedFFNConfig`; `balance` is the balance loss, `permuted` says whether units are moved.

    If `permuted`, the weights, the order of the units and the router have no values yet, nor have low-rank factors.
    """
    graph = mlp_graph(module)
    layout = layout_of(module, blocks, active, lora_alpha / lora_rank if lora_rank else 1.0)
    linears = {role: module.get_submodule(name) for role, name in roles(graph).items()}
    first, down = linears[layout.linears[0]], linears["down"]
    weight: Tensor = down.weight  # type: ignore[assignment]
    sizes = Sizes(in_features(first), in_features(down), out_features(down))
    router = Router(sizes.features, blocks, device=weight.device, dtype=weight.dtype)
    made = RoutedFFN(layout, sizes, router, balance, dropout=graph.dropout, trailing=graph.trailing)
    for role, linear in linears.items():
        for part, parameter in linear._parameters.items():
            if parameter is not None:
                made.register_parameter(f"{role}_{part}", _placed(parameter, permuted=permuted, frozen=lora_rank > 0))
        if lora_rank:
            factors = {"lora_a": (lora_rank, in_features(linear)), "lora_b": (out_features(linear), lora_rank)}
            for factor, shape in factors.items():
                made.register_parameter(f"{role}_{factor}", nn.Parameter(weight.new_empty(shape)))
    if permuted:
        made.unit_order = torch.empty(sizes.units, dtype=torch.int32, device=weight.device)
    for name in filter(None, (graph.dropout, graph.trailing)):
        made.others.add_module(name, module.get_submodule(name))
    made.__dict__["_dense"] = _described(module, graph)
    made.__dict__.update({name: module.__dict__[name] for name in _HOOKS})
    return made


def _described(module: nn.Module, graph: MLPGraph) -> Dense:
    named = {name: role for role, name in roles(graph).items()}
    stays = (graph.dropout, graph.trailing)
    children = {
        name: (None if child is None or name in stays else _Plain.of(child), named.get(name))
        for name, child in module._modules.items()
    }
    return Dense(_Plain.of(module), children)


def _placed(parameter: nn.Parameter, *, permuted: bool, frozen: bool) -> nn.Parameter:
    """The very Parameter where its values stay and it is trained as before; else one of its own."""
    if permuted:
        return nn.Parameter(torch.empty_like(parameter), requires_grad=parameter.requires_grad and not frozen)
    return nn.Parameter(parameter.detach(), requires_grad=False) if frozen else parameter


@torch.no_grad()
def fill(made: RoutedFFN, module: nn.Module, fitted: Fitted | None) -> RoutedFFN:
    """Give `made`, which `empty_routed_ffn` made of `module`, its values; `fitted` is None if units stay."""
    for role in made.layout.names:
        lora_a, lora_b = (made._parameters[f"{role}_{part}"] for part in ("lora_a", "lora_b"))
        if lora_a is not None and lora_b is not None:
            bound = lora_a.shape[1] ** -0.5
            nn.init.uniform_(lora_a, -bound, bound)
            nn.init.zeros_(lora_b)
    if fitted is None:
        made.router.reset_parameters()
        return made
    assert made.unit_order is not None
    made.unit_order.copy_(fitted.order)
    made.router.weight.copy_(fitted.weight)
    made.router.bias.copy_(fitted.bias)
    for role, name in roles(mlp_graph(module)).items():
        for part, given in module.get_submodule(name)._parameters.items():
            mine = made._parameters[f"{role}_{part}"]
            if given is not None and mine is not None:
                mine.copy_(_reordered(made, role, part, given.detach(), fitted.order.to(given.device)))
    return made


def _unit_dim(made: RoutedFFN, role: str, part: str) -> int | None:
    """Which dimension of a linear's tensor counts hidden units; None for down's bias."""
    if part == "bias":
        return None if role == "down" else 0
    return int((role == "down") != (role in made.layout.transposed))


def _reordered(made: RoutedFFN, role: str, part: str, tensor: Tensor, order: Tensor) -> Tensor:
    """`tensor` of one linear with its units in the given order."""
    dim = _unit_dim(made, role, part)
    if dim is None:
        return tensor
    order = order.long()
    return tensor.index_select(dim, torch.cat([order, order + len(order)]) if role == "gate_up" else order)


@torch.no_grad()
def dense(made: RoutedFFN, *, merge: bool = True) -> nn.Module:
    """The plain block, of the class that it was, with its units in their first order; `merge`: and low-rank factors."""
    block, children = made.__dict__["_dense"]
    module = block.made()
    module.__dict__.update({name: made.__dict__[name] for name in _HOOKS})
    for name, (plain, role) in children.items():
        if plain is None:
            child = made.others._modules.get(name)
        else:
            child = plain.made() if role is None else _dense_linear(made, role, plain, merge)
        module.add_module(name, child)
    return module


def _dense_linear(made: RoutedFFN, role: str, plain: _Plain, merge: bool) -> nn.Module:
    linear = plain.made()
    for part in ("weight", "bias"):
        mine = made._parameters[f"{role}_{part}"]
        values = None if mine is None else mine.detach()
        if part == "weight" and merge and values is not None:
            values = _merged(made, role, values)
        if values is not None and made.unit_order is not None:
            values = _reordered(made, role, part, values, made.unit_order.argsort())
        same = mine is None or (values is not None and values.data_ptr() == mine.data_ptr())
        keeps = mine is not None and mine.requires_grad == plain.trained[part]
        if values is not None and not (same and keeps):
            mine = nn.Parameter(values, requires_grad=plain.trained[part])
        linear.register_parameter(part, mine)
    return linear


def _merged(made: RoutedFFN, role: str, weight: Tensor) -> Tensor:
    """The weight plus the product of its low-rank factors, which is made in float32 at least."""
    lora_a, lora_b = (made._parameters[f"{role}_{part}"] for part in ("lora_a", "lora_b"))
    if lora_a is None or lora_b is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    product = made.layout.scaling * (lora_b.to(wide) @ lora_a.to(wide))
    return (weight.to(wide) + (product.t() if role in made.layout.transposed else product)).to(weight.dtype)
