"""A finished plan: the program of a module for one set of input shapes, and what it predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .assembling import Program, Stretch, assemble
from .bands import band_count
from .choosing import choose_stretches
from .estimating import Estimator
from .lowering import Lowered, lower
from .redistribution import Halo, halos
from .simulating import peak_bytes, plain_peak_bytes
from .tracing import Traced, module_of, op_name


@dataclass(frozen=True)
class Stage:
    """A stretch of ops in a row.

    Attributes:
        first, last: the modules of its first and its last op.
        ops: how many.
        how: "whole", "12 bands of 8 rows" or "3 x 3 tiles".
        peak_bytes: the most that is allocated while it runs, as the planner estimated it.
        macs: multiply-accumulates.
        extra_macs: of these, those that are there because something is computed again.
    """

    first: str
    last: str
    ops: int
    how: str
    peak_bytes: int
    macs: int
    extra_macs: int


@dataclass(frozen=True)
class LayerBytes:
    """What one op has before it and makes: whole maps before, what is held of them now.

    Attributes:
        name: the op's module, and the op.
        before_bytes, after_bytes: live bytes while it runs.
    """

    name: str
    before_bytes: int
    after_bytes: int


@dataclass
class Plan:
    """How one module runs for one set of input shapes. `print(plan)` shows a table; `plot` draws the layers' bytes.

    All bytes are those of what a call allocates, at its worst moment: its inputs, the parameters and the buffers are
    not counted.

    Attributes:
        module: the qualified name of the module in the model, "" for the model itself.
        schedule: "stream" or "patch".
        inputs: the shapes of the tensors that the module is called with.
        stages: what runs whole and what part by part.
        peak_bytes, plain_peak_bytes: with the plan, and of the module as it is.
        macs, plain_macs: multiply-accumulates of convolutions and products.
        ends: ops that cannot be computed in parts, and why: a stage ends before each.
        layers: the bytes around each op, in order.
        halos: what each op with a window adds to what neighbouring tiles compute twice.
        calls: how many calls ran by a plan ("planned"), and why others did not.
        program: the steps of a call.
    """

    module: str
    schedule: str
    inputs: tuple[tuple[int, ...], ...]
    stages: tuple[Stage, ...]
    peak_bytes: int
    plain_peak_bytes: int
    macs: int
    plain_macs: int
    ends: Mapping[str, str]
    layers: tuple[LayerBytes, ...]
    halos: tuple[Halo, ...] = ()
    calls: Mapping[str, int] = field(default_factory=dict)
    program: Program = field(repr=False, default=None)  # type: ignore[assignment]

    @property
    def is_sliced(self) -> bool:
        """Whether anything runs part by part."""
        return any(stage.how != "whole" for stage in self.stages)

    def __str__(self) -> str:
        from .describing import describe

        return describe(self)

    def plot(self, path: Any) -> Any:
        """Draw the bytes around each layer before and after, as a PNG or another format that `path` names.

        Needs matplotlib (`pip install 'memsave[plot]'`). Returns the path.
        """
        from .describing import plot

        return plot(self, path)

    def redistribution(self) -> str:
        """A table of the ops whose kernels and strides widen what tiles must compute again: where it would pay to use
        smaller kernels early and larger ones behind the stage (MCUNetV2, section 3.2)."""
        from .describing import describe_halos

        return describe_halos(self)


def make_plan(
    traced: Traced, module: nn.Module, leaves: Sequence[Any], *, schedule: str, name: str = "", **wished: Any
) -> Plan:
    """Plan one call of `module` on tensors like `leaves`.

    Args:
        wished: `budget_bytes`, `parts` (bands, or tiles along each axis), `split` (the name of the last module that
            runs in parts), each None to choose.

    Raises:
        CannotTrace: the graph does not fit the shapes.
        UnsupportedModelError: the budget cannot be met, or nothing can be sliced as wished.
    """
    lowered = lower(traced, module, leaves)
    formatted = _runs_channels_last(lowered)
    made: dict[tuple[Stretch, ...], tuple[Program, int]] = {}

    def exact_bytes(stretches: Sequence[Stretch]) -> int:
        key = tuple(stretches)
        if key not in made:
            program = assemble(lowered, stretches, channels_last=formatted)
            made[key] = program, peak_bytes(program, lowered)
        return made[key][1]

    stretches, planner = choose_stretches(lowered, {"schedule": schedule, **wished}, exact_bytes)
    exact_bytes(stretches)
    program, peak = made[tuple(stretches)]
    plain_peak = plain_peak_bytes(module, traced, lowered, leaves)
    return Plan(
        module=name,
        schedule=schedule,
        inputs=tuple(tuple(n.meta["val"].shape) for n in lowered.inputs.values()),
        stages=tuple(_stage(stretch, planner.estimator, lowered) for stretch in stretches),
        peak_bytes=peak,
        plain_peak_bytes=plain_peak,
        macs=program.macs,
        plain_macs=planner.plain.macs,
        ends=planner.ends(),
        layers=_layers(stretches, planner.estimator, lowered),
        halos=halos(stretches, lowered),
        program=program,
    )


def _runs_channels_last(lowered: Lowered) -> bool:
    """Whether parts of images are kept with the channels last: convolutions on the CPU are faster so."""
    convolutions = [n for n in lowered.nodes if getattr(n.target, "overloadpacket", None) is torch.ops.aten.conv2d]
    return any(n.meta["val"].device.type == "cpu" for n in convolutions)


def _stage(stretch: Stretch, estimator: Estimator, lowered: Lowered) -> Stage:
    nodes = stretch.nodes(lowered)
    plain = estimator.whole(stretch.start, stretch.stop)
    cost, how = estimator.of(stretch) or plain, "whole"
    if stretch.rules is not None and stretch.tiles:
        how = f"{' x '.join(map(str, stretch.tiles))} tiles"
    elif stretch.rules is not None:
        passes = [run for run in estimator.passes(stretch.start, stretch.stop, stretch.rules) or [] if run.local]
        counts = [band_count(run, stretch.rows) for run in passes] or [1]
        rows = f"{stretch.rows} row{'s' if stretch.rows > 1 else ''}"
        how = f"{max(counts)} bands of {rows}" + (f", {len(passes)} passes" if len(passes) > 1 else "")
    return Stage(
        first=module_of(nodes[0]),
        last=module_of(nodes[-1]),
        ops=len(nodes),
        how=how,
        peak_bytes=cost.peak_bytes,
        macs=cost.macs,
        extra_macs=max(0, cost.macs - plain.macs),
    )


def _layers(stretches: Sequence[Stretch], estimator: Estimator, lowered: Lowered) -> tuple[LayerBytes, ...]:
    found = []
    for stretch in stretches:
        after = None
        if stretch.rules is not None:
            cost = estimator.of(stretch)
            after = cost.peak_bytes if cost else None
        for i, node in enumerate(stretch.nodes(lowered), stretch.start):
            before = estimator.whole(i, i + 1, in_place=False).peak_bytes
            now = estimator.whole(i, i + 1).peak_bytes if after is None else after
            found.append(LayerBytes(op_name(node), before, now))
    return tuple(found)
