"""Finding the feed-forward parts of a model that can run on some tokens at a time.

Three forms: a module with both linears (Llama's MLP); two modules in turn, the second with the residual and the norm
(BERT's `intermediate` and `output`); linears among others in one module (OPT's `fc1` and `fc2` in its layer).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from ..mlp_graph import NoMatch, in_features, looks_like_mlp, mlp_graph, out_features
from .attention import is_projection
from .rows import FusedBlock, RowWork, row_work


@dataclass
class RowPlan:
    """What runs on some tokens at a time, by names of modules of a model.

    Attributes:
        work: the modules that `RowWise` serves.
        lazy: the linears that return `LazyRows`.
        reasons: the blocks that need all tokens at a time, and why.
    """

    work: dict[str, RowWork] = field(default_factory=dict)
    lazy: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)


def row_plan(model: nn.Module, chosen: Collection[str], tails: Collection[str], *, kernel: bool = False) -> RowPlan:
    """The plan for a model whose linears `chosen` become low-rank.

    Args:
        tails: modules around the output projection of attention, which may hand on `LazyRows` to the feed-forward part.
        kernel: whether blocks that are one module are to be one op.
    """
    plan, taken = RowPlan(), set(chosen)
    for name, module in model.named_modules():
        linears = {child: m for child, m in module.named_children() if f"{_dot(name)}{child}" in taken}
        if name and linears and looks_like_block(module):
            work = row_work(module, [in_features(next(iter(linears_of(module).values())))])
            if work is None:
                plan.reasons[name] = "not fused: tried on a few tokens, its forward does not work on each alone"
            else:
                plan.work[name] = replace(work, kernel=_fused_block(module) if kernel else None)
            continue
        for first, second in _chains(linears):
            plan.lazy.add(f"{_dot(name)}{first}")
            taken -= {f"{_dot(name)}{first}", f"{_dot(name)}{second}"}
        pair = _pair(module, name, taken)
        if pair is not None:
            first, second, work = pair
            plan.lazy.add(first)
            plan.work[second] = work
    for tail in tails:
        module = model.get_submodule(tail)
        linear = next(iter(linears_of(module).values()))
        work = row_work(module, _sizes(linear))
        if work is not None:
            layer = tail.rpartition(".")[0].rpartition(".")[0]
            followed = any(name.rpartition(".")[0] == layer and w.num_inputs == 2 for name, w in plan.work.items())
            plan.work[tail] = replace(work, lazy=followed)
    return plan


def _fused_block(module: nn.Module) -> FusedBlock | None:
    """What the op for a whole block must know of `module`; None if it computes something else."""
    try:
        graph = mlp_graph(module)
    except NoMatch:
        return None
    gate = graph.linears[0 if graph.fused else graph.gate]
    up = None if not graph.gated else gate if graph.fused else graph.linears[1 - graph.gate]
    return FusedBlock(gate, up, graph.down, int(graph.activation), graph.gate)


def looks_like_block(module: nn.Module) -> bool:
    """Whether `module` may be a whole feed-forward block, its linears dense or low-rank."""
    return len(linears_of(module)) > 1 and looks_like_mlp(module)


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The children that are linears."""
    return {name: child for name, child in module.named_children() if is_projection(child)}


def _chains(linears: dict[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of neighbours, the first of which widens what the second narrows."""
    names = list(linears)
    for first, second in zip(names, names[1:], strict=False):
        (narrow, wide), back = _sizes(linears[first]), _sizes(linears[second])
        if wide > narrow and back == [wide, narrow]:
            yield first, second


def _pair(module: nn.Module, name: str, chosen: Collection[str]) -> tuple[str, str, RowWork] | None:
    """Children of `module` with one linear each: the first widens; the second narrows, and takes the residual, too."""
    singles = []
    for child_name, child in module.named_children():
        linears = linears_of(child)
        if len(linears) == 1:
            (linear_name, linear), full = next(iter(linears.items())), f"{_dot(name)}{child_name}"
            singles.append((full, f"{full}.{linear_name}", linear))
    for (_, first_name, first), (second, second_name, back) in zip(singles, singles[1:], strict=False):
        narrow, wide = _sizes(first)
        if wide > narrow and _sizes(back) == [wide, narrow] and {first_name, second_name} <= set(chosen):
            work = row_work(module.get_submodule(second.removeprefix(_dot(name))), [wide, narrow])
            if work is not None:
                return first_name, second, work
    return None


def _sizes(linear: nn.Module) -> list[int]:
    """Its input's and its output's width."""
    return [in_features(linear), out_features(linear)]


def _dot(name: str) -> str:
    return f"{name}." if name else ""
