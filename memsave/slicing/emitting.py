"""From a pass and its parts to steps: what is allocated, computed, carried over and freed, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from .bands import Bands
from .passes import Pass
from .program import (
    Read,
    Run,
    Step,
    computing,
    computing_in_place,
    computing_into,
    extending,
    keeping,
    read_part,
)
from .regions import Interval, Region, lengths
from .rules.local import Local, Reduction

NOWHERE = 0


@dataclass
class SlotTable:
    """Numbers of slots: one for each whole value, one for the part of each sliced value."""

    whole: dict[fx.Node, int] = field(default_factory=dict)
    parts: dict[fx.Node, int] = field(default_factory=dict)
    states: dict[fx.Node, int] = field(default_factory=dict)
    count: int = 1

    def _new(self, table: dict[fx.Node, int], node: fx.Node) -> int:
        if node not in table:
            table[node] = self.count
            self.count += 1
        return table[node]

    def of_whole(self, node: fx.Node) -> int:
        return self._new(self.whole, node)

    def of_part(self, node: fx.Node) -> int:
        return self._new(self.parts, node)

    def of_state(self, node: fx.Node) -> int:
        return self._new(self.states, node)


class Emitter:
    """Common to both schedules: how one rule is computed for one part, given what is held of its sources.

    Attributes:
        steps: what was emitted.
        repeats: ranges of the steps that make, read and free the same shapes as the part before them.
        macs: multiply-accumulates of the steps.
    """

    def __init__(self, run: Pass, slots: SlotTable) -> None:
        self.run, self.slots = run, slots
        self.inner = {rule.node: rule for rule in run.local}
        self.targets = set(run.targets)
        self.steps: list[Step] = []
        self.repeats: list[tuple[int, int]] = []
        self.macs = 0
        self._shapes: list[Any] = []
        self._last_shapes: list[Any] = []
        self.consumers = run.consumers()

    def end_part(self, start: int) -> None:
        """Note whether the steps from `start` on are the last part's over again, elsewhere in the maps."""
        if self._shapes == self._last_shapes:
            self.repeats.append((start, len(self.steps)))
        self._shapes, self._last_shapes = [], self._shapes

    def is_part(self, node: fx.Node) -> bool:
        """Whether `node` exists in parts only during this pass."""
        return node in self.inner and node not in self.targets

    def reads(self, rule: Local, out: Region, got: Sequence[Region], held: Mapping[fx.Node, Region]) -> list[Read]:
        """The inputs of a rule: its sources' parts, then what is read whole."""
        found = []
        for source, dims, sizes, wanted in zip(rule.sources, rule.source_dims, rule.source_sizes, got, strict=True):
            if self.is_part(source):
                found.append(read_part(self.slots.of_part(source), dims, wanted, held[source]))
            else:
                whole = tuple((0, size) for size in sizes)
                found.append(read_part(self.slots.of_whole(source), dims, wanted, whole))
        offsets = [read.narrows for source, read in zip(rule.sources, found, strict=True) if self.is_part(source)]
        self._shapes.append((rule, lengths(out), [lengths(region) for region in got], offsets))
        return found + [Read(self.slots.of_whole(other)) for other in rule.others]

    def into_target(self, rule: Local, out: Region) -> Read:
        whole = tuple((0, rule.size(axis)) for axis in range(len(out)))
        return read_part(self.slots.of_whole(rule.node), rule.dims, out, whole)

    def compute_whole_part(self, rule: Local, out: Region, reads: Sequence[Read], got: Sequence[Region]) -> Run:
        """The run that writes a part of a target."""
        return computing_into(rule.bind(out, got), reads, self.into_target(rule, out), rule.takes_out)

    def gather(self, reduction: Reduction, part: Region, held: Region | None) -> None:
        """Add a part to what is gathered."""
        state, source = self.slots.of_state(reduction.node), reduction.source
        if held is None:
            whole = tuple((0, size) for size in reduction.source_size)
            read = read_part(self.slots.of_whole(source), reduction.source_dims, part, whole)
        else:
            read = read_part(self.slots.of_part(source), reduction.source_dims, part, held)
        slot, narrows, add = read.slot, read.narrows, reduction.add

        def run(env: list[Any]) -> Any:
            x = env[slot]
            for dim, start, length in narrows:
                x = x.narrow(dim, start, length)
            return add(env[state], x)

        self.steps.append(Step(run, state))

    def is_shared(self, node: fx.Node) -> bool:
        """Whether the part of `node` may be a view of another value's, or another value's part a view of it."""
        views = (r for r, _ in self.consumers.get(node, ()) if isinstance(r, Local))
        return may_view(self.inner[node]) or any(may_view(r) for r in views)

    def emit(self, run: Run, out: int) -> None:
        self.steps.append(Step(run, out))

    def free(self, slot: int) -> None:
        """Empty a slot after the last step so far."""
        last = self.steps[-1]
        self.steps[-1] = last._replace(frees=(*last.frees, slot))


def emit_tiles(run: Pass, tiles: Sequence[Mapping[fx.Node, Region]], slots: SlotTable) -> Emitter:
    """The steps of a pass in tiles, each of which knows the region of every value that it computes."""
    emitter = _TileEmitter(run, slots)
    for tile in tiles:
        start = len(emitter.steps)
        emitter.emit_tile(tile)
        emitter.end_part(start)
    return emitter


class _TileEmitter(Emitter):
    def emit_tile(self, regions: Mapping[fx.Node, Region]) -> None:
        active = [rule for rule in self.run.local if rule.node in regions]
        last: dict[fx.Node, Local] = {}
        for rule in active:
            last[rule.node] = rule
            last.update(dict.fromkeys(rule.sources, rule))
        for rule in active:
            self._compute(rule, regions, last)
            for reduction in self.run.reductions:
                if reduction.source is rule.node and reduction.node in regions:
                    held = regions[rule.node] if self.is_part(rule.node) else None
                    self.gather(reduction, regions[reduction.node], held)
            for node in {*rule.sources, rule.node}:
                if last[node] is rule and self.is_part(node):
                    self.free(self.slots.of_part(node))
        for reduction in self.run.reductions:
            if reduction.source not in self.inner and reduction.node in regions:
                self.gather(reduction, regions[reduction.node], None)

    def _compute(self, rule: Local, regions: Mapping[fx.Node, Region], last: Mapping[fx.Node, Local]) -> None:
        out = regions[rule.node]
        got = [rule.needs(i, out) for i in range(len(rule.sources))]
        self.macs += rule.macs(out, got)
        reads = self.reads(rule, out, got, regions)
        compute, slot = rule.bind(out, got), self.slots.of_part(rule.node)
        if rule.node in self.targets:
            self.emit(self.compute_whole_part(rule, out, reads, got), NOWHERE)
            return
        for source, read in zip(rule.sources, reads, strict=False):
            value, mine = source.meta["val"], rule.node.meta["val"]
            same = value.shape == mine.shape and value.dtype == mine.dtype and not read.narrows
            if rule.in_place and same and self.is_part(source) and last[source] is rule and not self.is_shared(source):
                self.emit(computing_in_place(compute, reads, self.slots.of_part(source)), slot)
                return
        self.emit(computing(compute, reads), slot)


def emit_bands(run: Pass, bands: Bands, slots: SlotTable) -> Emitter:
    """The steps of a pass in bands."""
    emitter = _BandEmitter(run, bands, slots)
    for band in range(bands.count):
        start = len(emitter.steps)
        emitter.emit_band(band)
        emitter.end_part(start)
    return emitter


class _BandEmitter(Emitter):
    def __init__(self, run: Pass, bands: Bands, slots: SlotTable) -> None:
        super().__init__(run, slots)
        self.bands = bands
        self.held: dict[fx.Node, Interval] = {}

    def emit_band(self, band: int) -> None:
        new = {rule.node: self.bands.new(band, rule.node) for rule in self.run.local}
        active = [rule for rule in self.run.local if new[rule.node][1] > new[rule.node][0]]
        last = self._last_reads(band, active)
        for rule in active:
            self._compute(band, rule, new[rule.node])
            for reduction in self.run.reductions:
                if reduction.source is rule.node:
                    self._gather(band, reduction)
            done = [n for n in {*rule.sources, rule.node} if last.get(n) is rule and self.is_part(n)]
            self._release(band, done)
        for reduction in self.run.reductions:
            if reduction.source not in self.inner:
                self._gather(band, reduction)

    def _last_reads(self, band: int, active: Sequence[Local]) -> dict[fx.Node, Local]:
        """The last rule of the band that reads or makes each value."""
        last: dict[fx.Node, Local] = {}
        for rule in active:
            last[rule.node] = rule
            for source in rule.sources:
                last[source] = rule
        return last

    def _gather(self, band: int, reduction: Reduction) -> None:
        start, stop = self.bands.new(band, reduction.source)
        if stop > start:
            held = (self.held[reduction.source],) if self.is_part(reduction.source) else None
            self.gather(reduction, ((start, stop),), held)

    def _compute(self, band: int, rule: Local, rows: Interval) -> None:
        out: Region = (rows,)
        got = [rule.needs(i, out) for i in range(len(rule.sources))]
        self.macs += rule.macs(out, got)
        reads = self.reads(rule, out, got, {n: (span,) for n, span in self.held.items()})
        node, slot = rule.node, self.slots.of_part(rule.node)
        if node in self.targets:
            self.emit(self.compute_whole_part(rule, out, reads, got), NOWHERE)
            return
        compute, carried = rule.bind(out, got), self.held.get(node)
        if carried is not None and carried[1] > carried[0]:
            shape = rule.part_shape(((carried[0], rows[1]),))
            length, dim = rows[1] - rows[0], rule.dims[0]
            self.emit(extending(compute, reads, slot, dim, rule.takes_out, length, shape), slot)
            self.held[node] = (carried[0], rows[1])
            return
        self.held[node] = rows
        if rule.in_place and (dying := self._dying(band, rule, reads)) is not None:
            source_slot = self.slots.of_part(dying)
            self.emit(computing_in_place(compute, reads, source_slot), slot)
        else:
            self.emit(computing(compute, reads), slot)

    def _dying(self, band: int, rule: Local, reads: Sequence[Read]) -> fx.Node | None:
        """A source that nothing reads after this rule, and whose part is as large as the output's."""
        for source, read in zip(rule.sources, reads, strict=False):
            if not self.is_part(source) or read.narrows or self.is_shared(source):
                continue
            value, mine = source.meta["val"], rule.node.meta["val"]
            same = value.shape == mine.shape and value.dtype == mine.dtype
            readers = [r for r, _ in self.consumers[source] if isinstance(r, Local)]
            later = self._first_low(band + 1, source) < self.held[source][1]
            if same and readers[-1] is rule and not later:
                return source
        return None

    def _first_low(self, band: int, node: fx.Node) -> int:
        """The first row that `band` or a later one reads of `node`."""
        big = self.bands.stops[-1][node] + 1
        return self.bands.lows[band].get(node, big) if band < self.bands.count else big

    def _release(self, band: int, nodes: Sequence[fx.Node]) -> None:
        """Free parts, or keep of them what later bands read."""
        for node in nodes:
            base, stop = self.held.pop(node)
            low = max(base, self._first_low(band + 1, node))
            self._shapes.append((node, low - base, stop - low))
            slot = self.slots.of_part(node)
            if low >= stop:
                self.free(slot)
            else:
                self.held[node] = (low, stop)
                if low > base:
                    dim = self.inner[node].dims[0]
                    self.emit(keeping(slot, dim, low - base, stop - low), slot)


def may_view(rule: Local) -> bool:
    """Whether the rule's output may share its source's storage."""
    return not rule.is_new
