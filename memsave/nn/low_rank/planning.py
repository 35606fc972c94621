"""What becomes low-rank in a model, of which rank, and what streams around it. Nothing is touched.

W is (O, D), of rank R; h heads of size D' make O = h * D' where factors are per head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from .attention import attention_projections, head_layout
from .factorize import spectrum
from .feed_forward import row_plan
from .layout import HeadLayout
from .ranks import allocate, break_even_rank, rank_for_energy, rank_for_ratio
from .replacing import weight_of
from .rows import RowWork

ALIGNMENT, ALIGNED_FROM = 8, 64
"""Ranks that follow from a ratio or an energy are multiples of the first, from the second on."""

EachMoment = Callable[[Callable[[str, Tensor | None], None]], None]
"""Calls its argument with the name of every target and its second moment (D, D), or None."""


class Settings(Protocol):
    """What this file needs to know of a method's config."""

    @property
    def rank(self) -> int | None: ...
    @property
    def ratio(self) -> float | None: ...
    @property
    def energy(self) -> float | None: ...
    @property
    def allocation(self) -> str: ...
    @property
    def damping(self) -> float: ...
    @property
    def per_head(self) -> bool: ...
    @property
    def fuse(self) -> bool: ...
    @property
    def kernel(self) -> bool: ...


@dataclass
class LowRankPlan:
    """By name of a module.

    Attributes:
        linears: what `replacing.empty_low_rank` must know.
        heads: the attention modules that run by groups of heads.
        rows: the modules that run on some tokens at a time.
        refused: targets that stay dense, and why.
        reasons: attention modules and feed-forward blocks that do not stream, and why.
    """

    linears: dict[str, dict[str, Any]] = field(default_factory=dict)
    heads: dict[str, HeadLayout] = field(default_factory=dict)
    rows: dict[str, RowWork] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def low_rank_plan(
    model: nn.Module, targets: Mapping[str, nn.Module], settings: Settings, each_moment: EachMoment
) -> LowRankPlan:
    """The plan for the linears `targets` of a model; the moments are asked for only where ranks depend on values."""
    plan = LowRankPlan(refused=dict(_shared_or_adapted(model, targets)))
    left = {name: module for name, module in targets.items() if name not in plan.refused}
    layouts = _layouts(model, left, plan) if settings.fuse or settings.per_head else {}
    heads = _heads(layouts) if settings.per_head else {}
    for name, rank in _ranks(left, heads, settings, each_moment).items():
        reason = _why_dense(weight_of(left[name]), rank, heads.get(name))
        if reason is None:
            plan.linears[name] = {"rank": rank, "heads": heads.get(name), "lazy": False}
        else:
            plan.refused[name] = reason
    if settings.fuse:
        _plan_streaming(model, layouts, plan, settings.kernel)
    return plan


def _plan_streaming(model: nn.Module, layouts: Mapping[str, HeadLayout], plan: LowRankPlan, kernel: bool) -> None:
    for root, layout in layouts.items():
        if _join(root, layout.output) in plan.linears:
            plan.heads[root] = layout
        else:
            plan.reasons[root] = "not fused: its output projection stays dense, so its output would be whole"
    tails = [_join(root, layout.tail) for root, layout in plan.heads.items() if layout.tail]
    rows = row_plan(model, plan.linears, tails, kernel=kernel)
    plan.rows = rows.work
    plan.reasons |= rows.reasons
    for name in rows.lazy:
        plan.linears[name]["lazy"] = True


def _shared_or_adapted(model: nn.Module, targets: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Targets that cannot become low-rank because of what else there is in the model."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, module in targets.items():
        others = [other for other in owners[id(module.weight)] if other != name]
        if others:
            yield name, f"its weight is also that of {others[0]}, so factors would not take its place but add to it"
        elif name.rpartition(".")[2] == "base_layer":
            yield name, "it is the base of an adapter; merge the adapter first, or add it afterwards"


def _layouts(model: nn.Module, targets: Mapping[str, nn.Module], plan: LowRankPlan) -> dict[str, HeadLayout]:
    """By root: the attention modules that have a target among their projections and can run by groups of heads."""
    found = {}
    for inner, roles in attention_projections(model):
        around = inner.rpartition(".")[0]
        projects = any(_join(inner, name) in targets for name in roles.values())
        if not projects and not any(name.startswith(f"{around}.") for name in targets):
            continue
        result = head_layout(model, inner, roles)
        if isinstance(result, str):
            if projects:
                plan.reasons[inner] = f"not fused: {result}"
        elif projects or _join(result[0], result[1].output) in targets:
            found[result[0]] = result[1]
    return found


def _heads(layouts: Mapping[str, HeadLayout]) -> dict[str, int]:
    """By linear: into how many heads its outputs are divided."""
    found: dict[str, int] = {}
    for root, layout in layouts.items():
        counts = {layout.query: layout.num_heads, layout.key: layout.num_kv_heads, layout.value: layout.num_kv_heads}
        if layout.fused:
            counts = {layout.query: layout.num_heads + 2 * layout.num_kv_heads}
        found |= {_join(root, name): count for name, count in counts.items()}
    return found


def _ranks(
    targets: Mapping[str, nn.Module], heads: Mapping[str, int], settings: Settings, each_moment: EachMoment
) -> dict[str, int | None]:
    """The rank of every target, per head where it has heads; None where it is better dense."""
    shapes = {name: tuple(weight_of(module).shape) for name, module in targets.items()}
    if settings.rank is not None:
        return dict.fromkeys(targets, settings.rank)
    if settings.ratio is not None and settings.allocation == "uniform":
        ratio = settings.ratio
        return {n: _aligned(rank_for_ratio(o // heads.get(n, 1), d, ratio)) for n, (o, d) in shapes.items()}
    spectra: dict[str, Tensor] = {}

    def add(name: str, moment: Tensor | None) -> None:
        if name in targets:
            spectra[name] = spectrum(weight_of(targets[name]), moment=moment, damping=settings.damping)

    each_moment(add)
    if settings.energy is not None:
        return {name: _aligned(rank_for_energy(spectra[name], settings.energy), up=True) for name in targets}
    assert settings.ratio is not None
    ranks = allocate({name: spectra[name] for name in targets}, shapes, settings.ratio)  # type: ignore[arg-type]
    return {name: None if rank is None else _aligned(rank) for name, rank in ranks.items()}


def _aligned(rank: int, *, up: bool = False) -> int:
    """A chosen rank as a multiple of 8, where that changes little: matrix products are quicker with it."""
    if rank < ALIGNED_FROM:
        return rank
    return rank + (-rank % ALIGNMENT if up else -(rank % ALIGNMENT))


def _why_dense(weight: Tensor, rank: int | None, heads: int | None) -> str | None:
    """Say why factors would not be smaller than the weight, or return None."""
    out_features, in_features = weight.shape
    if rank is None:
        return "its share of the budget buys the whole weight"
    if heads is not None:
        out_features //= heads
    if rank <= break_even_rank(out_features, in_features):
        return None
    per_head = "" if heads is None else f" for each of {heads} heads"
    return (
        f"rank {rank}{per_head} has {rank * (out_features + in_features):,} parameters, "
        f"and the weight {out_features * in_features:,}"
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}".strip(".")
