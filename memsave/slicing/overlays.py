"""Results written over maps that nothing reads any more: a pass then needs one map less.

Rows of the old map that a later band reads again must not be overwritten before: they are copied into a line buffer
first, as if the old map were computed in the pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from .bands import Rows, band_count, band_lows, band_stops, plan_bands
from .passes import Pass
from .regions import Interval, Region
from .rules.local import Compute, Local
from .whole import Storages


class Loaded:
    """Stands for the copy of a map, in the place of its node."""

    def __init__(self, source: fx.Node) -> None:
        self.source = source
        self.meta = source.meta

    def __repr__(self) -> str:
        return f"loaded {self.source}"


class Load(Local):
    """Copies rows of a map that is about to be overwritten."""

    takes_out = True

    def __init__(self, source: fx.Node, dims: Sequence[int], channels_last: bool) -> None:
        super().__init__(Loaded(source), [source], [dims], dims)  # type: ignore[arg-type]
        image = channels_last and len(self.shape) == 4
        self._format = torch.channels_last if image else torch.preserve_format

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        form = self._format

        def compute(x: Tensor, out: Tensor | None = None) -> Tensor:
            return x.clone(memory_format=form) if out is None else out.copy_(x)

        return compute


def overlay(
    run: Pass, is_dying: Callable[[fx.Node], bool], rows: int, *, channels_last: bool, sampled: bool = False
) -> tuple[Pass, dict[fx.Node, fx.Node]]:
    """The pass in bands of `rows` rows, and for each target that goes over a dying source, that source.

    Args:
        is_dying: whether a whole value has a storage of its own that nothing reads after the pass.
        sampled: whether to look at a few bands only, for an estimate.
    """
    changed, chosen = run, dict[fx.Node, fx.Node]()
    loaded: dict[fx.Node, fx.Node] = {}
    for target, source, dims in _candidates(run, is_dying):
        if target in chosen or source in chosen.values():
            continue
        if not _may_overwrite(changed, target, source, _stops(changed, rows, sampled)):
            load = Load(source, dims, channels_last)
            tried = _with_load(changed, source, load)
            if not _is_loaded_in_time(target, load.node, _stops(tried, rows, sampled)):
                continue
            changed, loaded[source] = tried, load.node
        chosen[target] = source
    stops = _stops(changed, rows, sampled)  # what was right before a load was added may not be so behind it
    for target, source in chosen.items():
        kept = source in loaded and _is_loaded_in_time(target, loaded[source], stops)
        if not kept and not _may_overwrite(changed, target, source, stops):
            return run, {}
    return changed, chosen


def _stops(run: Pass, rows: int, sampled: bool) -> list[Rows]:
    """The stops of all bands, or of three in the middle."""
    count = band_count(run, rows)
    if sampled and count > 3:
        return [band_stops(run, rows, count // 2 + i) for i in (-1, 0, 1)]
    return plan_bands(run, rows).stops


def _is_loaded_in_time(target: fx.Node, loaded: fx.Node, stops: Sequence[Rows]) -> bool:
    """Whether every row is copied before the target's is written there."""
    return all(rows[loaded] >= rows[target] for rows in stops)


def dying_test(passes: Sequence[Pass], index: int, storages: Storages, stop: int) -> Callable[[fx.Node], bool]:
    """Tells whether nothing reads a whole value after pass `index` of a stretch that ends before op number `stop`."""
    read: set[object] = {n for run in passes[index:] for node in run.ready for n in node.all_input_nodes}
    for run in passes[index + 1 :]:
        read |= {n for rule in run.local for n in (*rule.sources, *rule.others)} | {r.source for r in run.reductions}
    return lambda value: value not in read and storages.dies_before(value, stop)


def _candidates(run: Pass, is_dying: Callable[[fx.Node], bool]) -> Iterable[tuple[fx.Node, fx.Node, Sequence[int]]]:
    """Targets and sources of the same shape, dtype and layout, the last target first."""
    inner = {rule.node: rule for rule in run.local}
    gathered = {r.source for r in run.reductions}
    outer: dict[fx.Node, list[tuple[Local, int]]] = {}
    for rule in run.local:
        for i, source in enumerate(rule.sources):
            if source not in inner and source not in gathered:
                outer.setdefault(source, []).append((rule, i))
    whole = {other for rule in run.local for other in rule.others}
    for target in reversed(run.targets):
        for source, readers in outer.items():
            dims = {rule.source_dims[i] for rule, i in readers}
            same = dims == {inner[target].dims} and _kind(source) == _kind(target)
            if same and source not in whole and is_dying(source):
                yield target, source, inner[target].dims


def _kind(node: fx.Node) -> Any:
    value = node.meta["val"]
    return tuple(value.shape), tuple(value.stride()), value.dtype


def _may_overwrite(run: Pass, target: fx.Node, source: fx.Node, stops: Sequence[Rows]) -> bool:
    """Whether each band can write the target's rows where the source's were: nothing reads those any more."""
    order = {rule.node: i for i, rule in enumerate(run.local)}
    writer = run.local[order[target]]
    if any(order[rule.node] > order[target] for rule in run.local if source in rule.sources):
        return False
    if source in writer.sources and writer.takes_out and not writer.in_place:
        return False
    lowest: int | None = None  # of the source's rows that the bands from here on read
    for now, later in reversed(list(zip(stops, stops[1:], strict=False))):
        low = _lows(run, now, later).get(source)
        if low is not None:
            lowest = low if lowest is None else min(low, lowest)
        if lowest is not None and lowest < now[target]:
            return False
    return True


def _lows(run: Pass, before: Rows, stops: Rows) -> dict[fx.Node, int]:
    found: dict[fx.Node, int] = {}
    for node, low in band_lows(run, before, stops):
        found[node] = min(low, found.get(node, low))
    return found


def _with_load(run: Pass, source: fx.Node, load: Load) -> Pass:
    """The pass with a copy of a source first, read in its stead."""
    local: list[Local] = [load]
    for rule in run.local:
        if source in rule.sources:
            rule = copy.copy(rule)
            rule.sources = tuple(load.node if s is source else s for s in rule.sources)
        local.append(rule)
    return replace(run, local=local)
