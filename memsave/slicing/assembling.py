"""From a graph and a choice of stretches to the executor's steps.

A stretch is a run of the graph's ops: computed whole, one after the other, or part by part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from .bands import plan_bands
from .classify import Rules
from .emitting import NOWHERE, SlotTable, emit_bands, emit_tiles
from .folding import fold_norms, preparing
from .lowering import Lowered
from .overlays import dying_test, overlay
from .passes import Pass, passes_of
from .program import Run, Step, allocating
from .rules.statistics import ChannelMoments
from .tiles import plan_tiles
from .whole import Storages, calling, overwritten


@dataclass(frozen=True)
class Stretch:
    """Nodes [start, stop) of the lowered graph.

    Attributes:
        rules: how they are computed in parts, or None for whole.
        rows: of a band of the schedule "stream"; 0 for tiles.
        tiles: along each axis, for the schedule "patch".
    """

    start: int
    stop: int
    rules: Rules | None = None
    rows: int = 0
    tiles: tuple[int, ...] = ()

    def nodes(self, lowered: Lowered) -> list[fx.Node]:
        return lowered.nodes[self.start : self.stop]


@dataclass
class Program:
    """The steps of one call and where its tensors go.

    Attributes:
        steps: see `program.execute`.
        slots: how many slots the steps use.
        inputs: slot by the place of the leaf among the call's arguments.
        tensors: slot by qualified name of the parameter or buffer.
        kinds: fake twins of these, whose shapes, dtypes and devices the program was made for.
        constants: the tensors that the forward made, by slot.
        outputs: slots, or for what is no tensor of the graph None and the value.
        repeats: ranges of the steps that allocate and free what the part before them did.
        macs: multiply-accumulates of the convolutions and products.
    """

    steps: list[Step]
    slots: int
    inputs: dict[int, int]
    tensors: dict[str, int]
    kinds: dict[str, Tensor]
    constants: dict[int, Tensor]
    outputs: list[tuple[int | None, Any]]
    repeats: list[tuple[int, int]]
    macs: int


def wanted_of(stretch: Sequence[fx.Node], lowered: Lowered) -> list[fx.Node]:
    """The values of a stretch that are read behind it, or that the call returns."""
    inside = set(stretch)
    outputs = {o for o in lowered.outputs if isinstance(o, fx.Node)}
    return [n for n in stretch if n in outputs or any(u not in inside and u.op != "output" for u in n.users)]


def stretch_passes(stretch: Stretch, lowered: Lowered) -> list[Pass]:
    """The passes of a stretch that is computed part by part."""
    assert stretch.rules is not None
    nodes = stretch.nodes(lowered)
    wanted = wanted_of(nodes, lowered)
    return passes_of(nodes, [n for n in wanted if n in stretch.rules.local], stretch.rules)


def assemble(lowered: Lowered, stretches: Sequence[Stretch], *, channels_last: bool) -> Program:
    """The steps that compute the outputs, with each value freed when nothing reads it any more."""
    return _Assembly(lowered, channels_last).build(stretches)


class _Assembly:
    def __init__(self, lowered: Lowered, channels_last: bool) -> None:
        self.lowered, self.channels_last = lowered, channels_last
        self.slots = SlotTable()
        self.steps: list[Step] = []
        self._reads: list[list[int]] = []  # for each step, the slots of whole values that it reads
        self.repeats: list[tuple[int, int]] = []
        self.macs = 0
        self.outputs = {o for o in lowered.outputs if isinstance(o, fx.Node)}
        self.given = {*lowered.inputs.values(), *lowered.tensors, *lowered.constants}
        self._order = {node: i for i, node in enumerate(lowered.nodes)}
        self._storages = Storages(self._order, self.outputs)

    @cached_property
    def _given_slot(self) -> int:
        """A slot that holds a tensor throughout the call."""
        given = [*self.lowered.inputs.values(), *self.lowered.tensors, *self.lowered.constants]
        return self.slots.of_whole(given[0])

    def build(self, stretches: Sequence[Stretch]) -> Program:
        for stretch in stretches:
            if stretch.rules is None:
                for node in stretch.nodes(self.lowered):
                    self._whole(node)
            else:
                self._sliced(stretch)
        self._free_whole_values()
        slot, lowered = self.slots.of_whole, self.lowered
        return Program(
            steps=self.steps,
            inputs={i: slot(node) for i, node in lowered.inputs.items()},
            tensors={name: slot(node) for node, name in lowered.tensors.items()},
            kinds={name: node.meta["val"] for node, name in lowered.tensors.items()},
            constants={slot(node): value for node, value in lowered.constants.items()},
            outputs=[(slot(o), None) if isinstance(o, fx.Node) else (None, o) for o in lowered.outputs],
            slots=self.slots.count,
            repeats=self.repeats,
            macs=self.macs,
        )

    def _whole(self, node: fx.Node, in_place: bool = True) -> None:
        slot = self.slots.of_whole
        over = overwritten(node, self._storages) if in_place else None
        self.macs += node.meta["macs"]
        self._add(calling(node, slot, None if over is None else slot(over)), slot(node), node.all_input_nodes)

    def _add(self, run: Run, out: int, reads: Sequence[Any]) -> None:
        self.steps.append(Step(run, out))
        self._reads.append([self.slots.of_whole(n) for n in reads if n not in self.given])

    def _sliced(self, stretch: Stretch) -> None:
        passes = stretch_passes(stretch, self.lowered)
        whole = {n for run in passes for n in run.targets}
        for i, run in enumerate(passes):
            folded, folds, formed = fold_norms(run, whole, self.channels_last)
            for make, out, reads in preparing(folds, formed, self.slots.of_whole, self.channels_last):
                self._add(make, out, reads)
            over: dict[fx.Node, fx.Node] = {}
            if stretch.rows:
                is_dying = dying_test(passes, i, self._storages, stretch.stop)
                folded, over = overlay(folded, is_dying, stretch.rows, channels_last=self.channels_last)
            self._run_pass(folded, stretch, over)

    def _run_pass(self, run: Pass, stretch: Stretch, over: Mapping[fx.Node, fx.Node]) -> None:
        slot = self.slots.of_whole
        for target in run.targets:
            if target in over:
                self._add(_taking_over(slot(over[target])), slot(target), [])
                continue
            value = target.meta["val"]
            stride = value.stride() if _is_dense(value) else value.contiguous().stride()
            make = allocating(tuple(value.shape), tuple(stride), value.dtype, self._given_slot)
            self._add(make, slot(target), [])
        if stretch.tiles:
            emitter = emit_tiles(run, plan_tiles(run, stretch.tiles), self.slots)
        else:
            emitter = emit_bands(run, plan_bands(run, stretch.rows), self.slots)
        steps, offset = emitter.steps, len(self.steps)
        self.macs += emitter.macs
        self.repeats += [(start + offset, stop + offset) for start, stop in emitter.repeats]
        reads = {n for rule in run.local for n in (*rule.sources, *rule.others)} | {r.source for r in run.reductions}
        inner = {rule.node for rule in run.local} - set(run.targets)
        outer = [n for n in reads if n not in inner]
        for step in steps:
            self.steps.append(step)
            self._reads.append([])
        if steps:  # what the pass reads and writes lives until its end
            self._reads[-1] = [slot(n) for n in (*outer, *run.targets) if n not in self.given]
        for reduction in run.reductions:
            self._finish(reduction)
        for node in run.ready:
            self._whole(node, in_place=False)  # later passes may read its inputs again

    def _finish(self, reduction: Any) -> None:
        state, finish = self.slots.of_state(reduction.node), reduction.finish
        parameters = reduction.parameters if isinstance(reduction, ChannelMoments) else ()
        places = [self.slots.of_whole(n) for n in parameters]
        self._add(lambda env: finish(env[state], *[env[p] for p in places]), self.slots.of_whole(reduction.node), [])
        self.steps[-1] = self.steps[-1]._replace(frees=(state,))

    def _free_whole_values(self) -> None:
        """Free each whole value after the step that reads it last; what nobody reads, after the one that made it."""
        kept = {self.slots.of_whole(n) for n in self.outputs}
        last: dict[int, int] = {}
        whole = set(self.slots.whole.values()) - {self.slots.of_whole(n) for n in self.given}
        for i, (step, reads) in enumerate(zip(self.steps, self._reads, strict=True)):
            for slot in (*reads, step.out):
                if slot in whole and slot not in kept and slot != NOWHERE:
                    last[slot] = i
        for slot, i in last.items():
            self.steps[i] = self.steps[i]._replace(frees=(*self.steps[i].frees, slot))


def _taking_over(slot: int) -> Run:
    return lambda env: env[slot]


def _is_dense(value: Tensor) -> bool:
    """Whether the elements fill a block of memory, each place once."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
