"""A module's graph run part by part, compared with the module itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from memsave.slicing.assembling import Stretch, assemble, stretch_passes
from memsave.slicing.classify import Rules, classify
from memsave.slicing.executor import run
from memsave.slicing.lowering import Lowered, lower
from memsave.slicing.passes import NoPasses
from memsave.slicing.tracing import trace

aten = torch.ops.aten
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
ROWS = (1, 2, 3, 5, 1000)


def lively(module: nn.Module) -> nn.Module:
    """In evaluation, with parameters and statistics that hide nothing: no ones, zeros or equal channels."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in itertools.chain(module.named_parameters(), module.named_buffers()):
            if name.endswith("running_var"):
                value.uniform_(0.5, 2, generator=generator)
            elif value.is_floating_point() and value.dim() == 1:
                value.normal_(generator=generator)
    return module.eval()


def packet_of(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


@dataclass
class Subject:
    """A module on one input, with its graph for that input's shape."""

    module: nn.Module
    args: tuple[Any, ...]
    lowered: Lowered
    _rules: dict[tuple[int, ...], Rules] = field(default_factory=dict)
    _longest: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, *args: Any) -> Subject:
        return cls(module, args, lower(trace(module, args, {}), module, pytree.tree_leaves(args)))

    def rules(self, axes: Sequence[int]) -> Rules:
        key = tuple(axes)
        if key not in self._rules:
            self._rules[key] = classify(self.lowered.nodes, key)
        return self._rules[key]

    def longest(self, axes: Sequence[int]) -> tuple[int, int]:
        """The longest stretch of the graph that can be computed part by part, from the first op that has a rule."""
        key = tuple(axes)
        if key not in self._longest:
            self._longest[key] = self._find_longest(self.rules(axes))
        return self._longest[key]

    def _find_longest(self, rules: Rules) -> tuple[int, int]:
        nodes = self.lowered.nodes
        start = next((i for i, n in enumerate(nodes) if n in rules.local or n in rules.reductions), len(nodes))
        for stop in range(len(nodes), start, -1):
            try:
                if stretch_passes(Stretch(start, stop, rules, 1), self.lowered):
                    return start, stop
            except NoPasses:
                continue
        return start, start

    def stretch(self, axes: Sequence[int], rows: int = 0, tiles: tuple[int, ...] = ()) -> Stretch:
        return Stretch(*self.longest(axes), self.rules(axes), rows, tiles)

    def covers_all(self, axes: Sequence[int]) -> str:
        """Empty if all of the graph can be computed part by part, or what stands in the way."""
        start, stop = self.longest(axes)
        rules, nodes = self.rules(axes), self.lowered.nodes
        if stop == len(nodes) and not any(n in rules.reasons for n in nodes):
            return ""
        return f"only [{start}, {stop}) of {len(nodes)} ops: {rules.reasons}"

    def in_parts(self, axes: Sequence[int]) -> set[Any]:
        """The kinds of ops that are computed part by part."""
        start, stop = self.longest(axes)
        rules = self.rules(axes)
        inside = self.lowered.nodes[start:stop]
        return {packet_of(n) for n in inside if n in rules.local or n in rules.reductions}

    def run(self, stretch: Stretch, *, channels_last: bool = False) -> list[Any]:
        nodes = len(self.lowered.nodes)
        stretches = [Stretch(0, stretch.start), stretch, Stretch(stretch.stop, nodes)]
        program = assemble(self.lowered, stretches, channels_last=channels_last)
        tensors = dict(self.module.named_parameters(remove_duplicate=False))
        tensors |= dict(self.module.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            return run(program, pytree.tree_leaves(self.args), tensors)

    def expected(self) -> list[Any]:
        with torch.no_grad():
            return pytree.tree_leaves(self.module(*self.args))


def assert_close(found: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        assert (a.shape, a.dtype) == (b.shape, b.dtype), what
        if not b.is_floating_point():
            assert torch.equal(a, b), what
            continue
        largest = float(b.abs().max())
        assert not a.isnan().any(), f"{what}: NaN"
        error = float((a.double() - b.double()).abs().max())
        assert error <= TOLERANCES[b.dtype] * max(largest, 1e-30), f"{what}: {error / max(largest, 1e-30):.1e}"


def check(
    subject: Subject,
    axes: Sequence[int],
    *,
    rows: Sequence[int] = (),
    tiles: Sequence[tuple[int, ...]] = (),
    **how: Any,
) -> None:
    """All of the graph in bands along `axes[0]` if `rows` are given, in tiles along `axes` if `tiles` are."""
    axes = tuple(axes)
    expected = subject.expected()
    before = [leaf.clone() for leaf in pytree.tree_leaves(subject.args)]
    reason = subject.covers_all(axes)
    assert not reason, reason
    for stretch in [subject.stretch(axes, rows=r) for r in rows] + [subject.stretch(axes, tiles=t) for t in tiles]:
        what = f"axes {axes}, rows {stretch.rows}, tiles {stretch.tiles}"
        assert_close(subject.run(stretch, **how), expected, what)
        for leaf, old in zip(pytree.tree_leaves(subject.args), before, strict=True):
            assert torch.equal(leaf, old), f"{what}: it wrote into its input"


def check_both_schedules(subject: Subject, axes: Sequence[int], **how: Any) -> None:
    """In bands along each of `axes`, and in tiles along all of them."""
    for axis in axes:
        check(subject, (axis,), rows=ROWS, **how)
    rank = len(axes)
    tilings = [(2,) * rank, (1, 4, 2)[:rank], (5, 1, 3)[:rank]] + [(1,) * rank, (3,) * rank, (99,) * rank] * (rank < 3)
    check(subject, axes, tiles=tilings, **how)


def check_macs(subject: Subject, stretch: Stretch) -> None:
    """What the rules say of all parts against what is counted in the run."""
    program = assemble(subject.lowered, [stretch], channels_last=False)
    with FlopCounterMode(display=False) as counter:
        subject.run(stretch)
    assert program.macs * 2 == counter.get_total_flops()
