"""A quick estimate of what a stretch costs, for the planner to rank choices by; `simulating` says it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, fx

from .assembling import Stretch, stretch_passes
from .bands import Rows, band_count, band_lows, band_stops, filling_count, filling_stops
from .classify import Rules
from .folding import folded_bytes
from .lowering import Lowered
from .overlays import dying_test, overlay
from .passes import NoPasses, Pass
from .regions import Region
from .rules.local import Local
from .rules.pointwise import is_pointwise
from .tiles import tile_regions
from .whole import Storages, storage_of, tensors_of

FEW = 3  # bands, of which none may be in the middle
WEIGHT_SHARE = 0.25  # reading an element of a weight again, beside making one
STEPS_PER_RULE = 1.6  # in bands: a rule's own step, and for some what is carried over


@dataclass(frozen=True)
class Cost:
    """Of a stretch.

    Attributes:
        peak_bytes: at its worst moment.
        macs: multiply-accumulates.
        elements: elements of what its ops make.
        calls: calls of torch.
    """

    peak_bytes: int
    macs: int
    elements: int
    calls: float


class Estimator:
    """Costs of stretches of one lowered graph; remembers what it has worked out."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.outputs = {o for o in lowered.outputs if isinstance(o, fx.Node)}
        self._storages = Storages({node: i for i, node in enumerate(lowered.nodes)}, self.outputs)
        self._passes: dict[tuple[int, int, int], list[Pass] | None] = {}
        self._extra_macs: dict[tuple[int, int, int], int] = {}
        self._costs: dict[tuple[Any, ...], Cost | None] = {}

    @cached_property
    def _intervals(self) -> dict[int, tuple[int, int, int]]:
        """For each storage that ops make: its bytes, the node that makes it, and the last one that reads it."""
        nodes = self.lowered.nodes
        given = {storage_of(n.meta["val"]) for n in self.lowered.graph.nodes if n.op == "placeholder" and _is_tensor(n)}
        order = {node: i for i, node in enumerate(nodes)}
        found: dict[int, tuple[int, int, int]] = {}
        for i, node in enumerate(nodes):
            last = max((order.get(u, len(nodes)) for u in node.users), default=i)
            last = len(nodes) if node in self.outputs else last
            for tensor in tensors_of(node.meta.get("val")):
                key = storage_of(tensor)
                if key in given:
                    continue
                nbytes, first, until = found.get(key, (tensor.untyped_storage().nbytes(), i, last))
                found[key] = (nbytes, first, max(until, last))
        return found

    @cached_property
    def live_bytes(self) -> list[int]:
        """At each place in the graph, what was made before it and is read from there on."""
        changes = [0] * (len(self.lowered.nodes) + 2)
        for nbytes, first, last in self._intervals.values():
            changes[first + 1] += nbytes
            changes[last + 1] -= nbytes
        live, total = [], 0
        for change in changes[:-1]:
            total += change
            live.append(total)
        return live

    def whole(self, start: int, stop: int, *, in_place: bool = True) -> Cost:
        """Of nodes computed whole; `in_place`: elementwise ops overwrite what nothing reads any more."""
        nodes = self.lowered.nodes[start:stop]
        peak = 0
        for i, node in enumerate(nodes, start):
            new = sum(t.nbytes for t in tensors_of(node.meta.get("val")) if self._is_new(t, i))
            over = new if in_place and is_pointwise(node) and self.live_bytes[i + 1] <= self.live_bytes[i] else 0
            peak = max(peak, self.live_bytes[i] + new - over + _extra_bytes(node))
        elements = sum(t.numel() for node in nodes for t in tensors_of(node.meta.get("val")))
        return Cost(peak, sum(node.meta["macs"] for node in nodes), elements, len(nodes))

    def _is_new(self, tensor: Tensor, node: int) -> bool:
        interval = self._intervals.get(storage_of(tensor))
        return interval is not None and interval[1] == node

    def bands(self, start: int, stop: int, rules: Rules, rows: int) -> Cost | None:
        """Of a stretch in bands, or None if it cannot be computed so."""
        return self._sliced(start, stop, rules, rows, ())

    def tiles(self, start: int, stop: int, rules: Rules, counts: tuple[int, ...]) -> Cost | None:
        """Of a stretch in tiles, or None."""
        return self._sliced(start, stop, rules, 0, counts)

    def extra_macs(self, start: int, stop: int, rules: Rules) -> int:
        """What a stretch in bands computes again, whatever the size of the bands."""
        key = (start, stop, id(rules))
        if key not in self._extra_macs:
            again = 0
            done: set[fx.Node] = set()
            for run in self.passes(start, stop, rules) or []:
                again += sum(rule.node.meta["macs"] for rule in run.local if rule.node in done)
                done |= {rule.node for rule in run.local}
            self._extra_macs[key] = again
        return self._extra_macs[key]

    def of(self, stretch: Stretch) -> Cost | None:
        """Of a stretch as it is; None if it cannot be computed so."""
        if stretch.rules is None:
            return self.whole(stretch.start, stretch.stop)
        return self._sliced(stretch.start, stretch.stop, stretch.rules, stretch.rows, stretch.tiles)

    def passes(self, start: int, stop: int, rules: Rules) -> list[Pass] | None:
        key = (start, stop, id(rules))
        if key not in self._passes:
            try:
                self._passes[key] = stretch_passes(Stretch(start, stop, rules), self.lowered)
            except NoPasses:
                self._passes[key] = None
        return self._passes[key]

    def _sliced(self, start: int, stop: int, rules: Rules, rows: int, counts: tuple[int, ...]) -> Cost | None:
        key = (start, stop, id(rules), rows, counts)
        if key not in self._costs:
            passes = self.passes(start, stop, rules)
            usable = passes is not None and any(run.local for run in passes)
            self._costs[key] = self._cost_of(start, stop, passes, rows, counts) if usable and passes else None
        return self._costs[key]

    def _cost_of(self, start: int, stop: int, passes: Sequence[Pass], rows: int, counts: tuple[int, ...]) -> Cost:
        held = self.live_bytes[start]
        peak, macs, elements, calls = held, 0, 0, 0.0
        for i, run in enumerate(passes):
            over: dict[fx.Node, fx.Node] = {}
            prepared = folded_bytes(run)
            if rows and run.local:
                is_dying = dying_test(passes, i, self._storages, stop)
                run, over = overlay(run, is_dying, rows, channels_last=False, sampled=True)
            held += sum(t.nbytes for n in run.targets if n not in over for t in tensors_of(n.meta["val"]))
            if run.local or run.reductions:
                part = tile_cost(run, counts) if counts else band_cost(run, rows)
                peak = max(peak, held + prepared + part.peak_bytes)
                macs, elements, calls = macs + part.macs, elements + part.elements, calls + part.calls
            small = sum(t.nbytes for n in run.ready for t in tensors_of(n.meta.get("val")))
            peak, calls = max(peak, held + small), calls + len(run.ready)
        return Cost(peak, macs, elements, calls)

    def boundary_bytes(self, start: int, stop: int) -> int:
        """What a sliced stretch holds at least: all that is live before it, or behind it."""
        return max(self.live_bytes[start], self.live_bytes[stop])


def band_cost(run: Pass, rows: int) -> Cost:
    """Of a pass in bands, beside what is whole: judged by a middle band, or by all if they are few."""
    count = band_count(run, rows)
    if not run.local:
        return Cost(0, 0, 0, count * len(run.reductions))
    first = band_stops(run, rows, 0)
    second = band_stops(run, rows, 1) if count > 1 else first
    fill = filling_count(run, first, second) if count > 1 else 1
    places: list[list[Rows]]
    if count > FEW:
        places = [[band_stops(run, rows, count // 2 + i) for i in (-1, 0, 1)]]
    else:
        full = [band_stops(run, rows, band) for band in range(count)]
        places = [full[i - 1 : i + 2] for i in range(1, count)]
    if fill > 1:  # the last band before the first full one
        places.append([filling_stops(run, first, step, fill) for step in (fill - 2, fill - 1)] + [first])
    elif count <= FEW:
        places.append([{}, first, second])
    peak = 0
    for before, stops, *rest in places:
        now, later = _lowest(run, before, stops), _lowest(run, stops, rest[0] if rest else stops)
        peak = max(peak, _band_peak(run, before, stops, now, later, set(run.targets)))
    macs, elements = _work(run)
    count += fill - 1
    elements += int(count * _weight_elements(run) * WEIGHT_SHARE)
    return Cost(peak, macs, elements, count * (len(run.local) * STEPS_PER_RULE + len(run.reductions)))


def _weight_elements(run: Pass) -> int:
    """What each band reads of weights, beside its maps."""
    sizes = (n.meta["val"].numel() for rule in run.local for n in rule.others if n.meta.get("is_fixed"))
    return sum(sizes)


def _work(run: Pass) -> tuple[int, int]:
    """Multiply-accumulates and elements of a pass in bands, however many."""
    macs, elements, stops = 0, 0, band_stops(run, run.most_rows, 0)
    for rule in run.local:
        out: Region = ((0, stops[rule.node]),)
        if stops[rule.node]:
            elements += prod(rule.part_shape(out))
            macs += rule.macs(out, [rule.needs(i, out) for i in range(len(rule.sources))])
    return macs, elements


def _lowest(run: Pass, before: dict[fx.Node, int], stops: dict[fx.Node, int]) -> dict[fx.Node, int]:
    found: dict[fx.Node, int] = {}
    for node, low in band_lows(run, before, stops):
        found[node] = min(low, found.get(node, low))
    return found


def _band_peak(
    run: Pass,
    before: dict[fx.Node, int],
    stops: dict[fx.Node, int],
    now: dict[fx.Node, int],
    later: dict[fx.Node, int],
    targets: set[fx.Node],
) -> int:
    """The most bytes of parts during one band."""
    inner = {rule.node: rule for rule in run.local if rule.node not in targets}

    def part(node: fx.Node, low: int, stop: int) -> int:
        return inner[node].part_bytes(((low, stop),)) if stop > low else 0

    live = {n: part(n, min(now.get(n, s), later.get(n, s)), s) for n, s in before.items() if n in inner}
    total = peak = sum(live.values())
    readers: dict[fx.Node, Local] = {}
    for rule in run.local:
        readers.update(dict.fromkeys((rule.node, *rule.sources), rule))
    for rule in run.local:
        start, stop = before.get(rule.node, 0), stops[rule.node]
        if stop > start:
            out: Region = ((start, stop),)
            got = [rule.needs(i, out) for i in range(len(rule.sources))]
            low = min(now.get(rule.node, start), later.get(rule.node, start), start)
            new = part(rule.node, low, stop) if rule.node in inner else 0
            dying = [s for s in rule.sources if s in live and readers[s] is rule]
            over = rule.in_place and new and any(live[s] == new and later.get(s, stop) >= stops[s] for s in dying)
            extra = rule.extra_bytes(out, got)
            if not rule.takes_out and rule.node not in inner:
                extra += rule.part_bytes(out)  # it is computed first and copied then
            peak = max(peak, total + (0 if over else new) + extra)
            total += new - live.get(rule.node, 0)
            live[rule.node] = new
            peak = max(peak, total + _gathered_bytes(run, rule.node, out))
        for node in {rule.node, *rule.sources}:
            if readers[node] is rule and node in live and node in inner:
                carried = part(node, later.get(node, stops[node]), stops[node])
                total += carried - live[node]
                live[node] = carried
    for reduction in run.reductions:
        start, stop = before.get(reduction.source, 0), stops[reduction.source]
        peak = max(peak, total + reduction.extra_bytes(((start, stop),)))
    return peak


def _gathered_bytes(run: Pass, node: fx.Node, part: Region) -> int:
    """What gathering from a part of `node` allocates for a moment."""
    return max((r.extra_bytes(part) for r in run.reductions if r.source is node), default=0)


def tile_cost(run: Pass, counts: tuple[int, ...]) -> Cost:
    """Of a pass in tiles, beside what is whole. A tile's rows along one axis do not depend on its place on another."""
    most = max(counts)
    diagonal = [tile_regions(run, counts, tuple(min(i, c - 1) for c in counts)) for i in range(most)]
    macs = elements = 0
    for rule in run.local:
        whole: Region = tuple((0, rule.size(axis)) for axis in range(len(counts)))
        share = 1.0
        for axis, count in enumerate(counts):
            spans = [regions[rule.node][axis] for regions in diagonal[:count] if rule.node in regions]
            share *= sum(stop - start for start, stop in spans) / rule.size(axis)
        macs += round(share * rule.macs(whole, [rule.needs(i, whole) for i in range(len(rule.sources))]))
        elements += round(share * prod(rule.shape))
    peak = _tile_peak(run, diagonal[most // 2])
    return Cost(peak, macs, elements, prod(counts) * (len(run.local) + len(run.reductions)))


def _tile_peak(run: Pass, regions: dict[fx.Node, Region]) -> int:
    targets, live = set(run.targets), dict[fx.Node, int]()
    readers: dict[fx.Node, Local] = {}
    for rule in run.local:
        readers.update(dict.fromkeys((rule.node, *rule.sources), rule))
    peak = 0
    for rule in run.local:
        if rule.node not in regions:
            continue
        out = regions[rule.node]
        got = [rule.needs(i, out) for i in range(len(rule.sources))]
        new = rule.part_bytes(out)
        dying = [s for s in rule.sources if s in live and readers[s] is rule]
        over = rule.in_place and any(live[s] == new for s in dying)
        peak = max(peak, sum(live.values()) + (0 if over else new) + rule.extra_bytes(out, got))
        live[rule.node] = new
        peak = max(peak, sum(live.values()) + _gathered_bytes(run, rule.node, out))
        for node in {rule.node, *rule.sources}:
            if readers[node] is rule:
                live.pop(node, None)
        if rule.node in targets:
            live.pop(rule.node, None)
    return peak


def _extra_bytes(node: fx.Node) -> int:
    """What some ops allocate beside their result when they are computed whole."""
    packet = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    value = node.meta.get("val")
    if packet.startswith("max_pool") and isinstance(value, Tensor):
        return 8 * value.numel()
    pads = node.meta.get("merged_pads")
    if pads and any(a != b for a, b in pads):
        return int(node.args[0].meta["val"].nbytes)  # type: ignore[union-attr]
    return 0


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
