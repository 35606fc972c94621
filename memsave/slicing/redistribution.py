"""Which kernels and strides widen what a tile needs of the input: MCUNetV2's receptive-field redistribution, as data.

A tile's halo grows at every kernel larger than its stride. An op early in a stage costs more than the same op late:
all strides behind it multiply the rows that it adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .assembling import Stretch, stretch_passes
from .lowering import Lowered
from .tracing import module_of


@dataclass(frozen=True)
class Halo:
    """What one op adds to the halo of its stage.

    Attributes:
        module: its qualified name.
        kernel: rows that one output row reads, dilation counted.
        stride: rows between the windows of neighbouring output rows.
        halo_rows: rows that the op adds to what a tile reads of the stage's input.
        extra_macs: multiply-accumulates of the ops before it, for each halo row and tile border, that are done twice.
    """

    module: str
    kernel: int
    stride: int
    halo_rows: int
    extra_macs: int


def halos(stretches: Sequence[Stretch], lowered: Lowered) -> tuple[Halo, ...]:
    """For every op with a window in the stretches that run in parts, its share of the halo along the first axis."""
    found: list[Halo] = []
    for stretch in stretches:
        if stretch.rules is not None:
            found += _of_stretch(stretch, lowered)
    return tuple(found)


def _of_stretch(stretch: Stretch, lowered: Lowered) -> list[Halo]:
    assert stretch.rules is not None
    rules = stretch.rules
    found = []
    for run in stretch_passes(stretch, lowered):
        scale: dict[object, int] = {}  # input rows of the stretch for each row of a value
        work = 0  # multiply-accumulates per input row of the stretch, so far
        for rule in run.local:
            before = max((scale.get(source, 1) for source in rule.sources), default=1)
            reach = rule.reach(0)
            stride = reach[1] if reach else 1
            scale[rule.node] = before * stride
            if reach and reach[0] > stride:
                rows = (reach[0] - stride) * before
                found.append(Halo(module_of(rule.node), reach[0], stride, rows, work * rows))
            row = ((0, 1), *((0, rule.size(axis)) for axis in range(1, len(rules.axes))))
            work += rule.macs(row, [rule.needs(i, row) for i in range(len(rule.sources))]) // scale[rule.node]
    return found
