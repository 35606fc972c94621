"""What is computed part by part in one go: from values that exist whole to values, or gathered numbers, that will."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import fx

from .classify import Rules
from .rules.local import Local, Reduction


@dataclass
class Pass:
    """One run over all parts.

    Attributes:
        local: the rules that are applied to each part, in topological order.
        reductions: what is gathered, in order.
        targets: the values that are written whole; all are outputs of `local`.
        ready: whole values computed from what was gathered, after the run: ops of small tensors.
    """

    local: list[Local]
    reductions: list[Reduction]
    targets: list[fx.Node]
    ready: list[fx.Node] = field(default_factory=list)

    @cached_property
    def ends(self) -> list[tuple[fx.Node, int]]:
        """What decides how far a band goes, each with its rows along the first axis."""
        sizes = {rule.node: rule.size(0) for rule in self.local}
        ends = [(node, sizes[node]) for node in self.targets]
        return ends + [(r.source, r.source_size[0]) for r in self.reductions]

    @cached_property
    def entries(self) -> list[fx.Node]:
        """What reads nothing but whole maps."""
        inner = {rule.node for rule in self.local}
        return [rule.node for rule in self.local if not inner & set(rule.sources)]

    @cached_property
    def most_rows(self) -> int:
        """The rows of the largest of the ends; 0 without any."""
        return max((size for _, size in self.ends), default=0)

    def consumers(self) -> dict[fx.Node, list[tuple[Local | Reduction, int]]]:
        """Who reads each sliced value, and as which of its sources."""
        found: dict[fx.Node, list[tuple[Local | Reduction, int]]] = {}
        for rule in self.local:
            for i, source in enumerate(rule.sources):
                found.setdefault(source, []).append((rule, i))
        for reduction in self.reductions:
            found.setdefault(reduction.source, []).append((reduction, 0))
        return found


class NoPasses(Exception):
    """A stretch of the graph cannot be computed part by part; the text says why."""


def passes_of(nodes: Sequence[fx.Node], wanted: Collection[fx.Node], rules: Rules) -> list[Pass]:
    """The passes that compute `wanted` from what is not in `nodes`, computing again what an earlier pass did not write.

    Args:
        nodes: a stretch of the graph in topological order.
        wanted: values of it that are needed whole.

    Raises:
        NoPasses: an op in it needs a sliced value whole.
    """
    level = _levels(nodes, rules)
    inside = set(nodes)
    first = [n for n in nodes if n not in rules.local and n not in rules.reductions and level[n] == 0]
    passes = [Pass([], [], [], first)] if first else []
    written: set[fx.Node] = set()
    for current in range(max(level.values(), default=0) + 1):
        targets = [n for n in nodes if n in wanted and n in rules.local and level[n] == current]
        reductions = [rules.reductions[n] for n in nodes if n in rules.reductions and level[n] == current + 1]
        needed = _ancestors(targets, reductions, inside, written, rules)
        local = [rules.local[n] for n in nodes if n in needed]
        ready = [n for n in nodes if n not in rules.local and n not in rules.reductions and level[n] == current + 1]
        if targets or reductions or ready:
            passes.append(Pass(local, reductions, targets, ready))
        written |= set(targets)
    return passes


def _levels(nodes: Sequence[fx.Node], rules: Rules) -> dict[fx.Node, int]:
    """In which pass each op can first be computed; what was gathered in pass i is ready for pass i + 1."""
    level: dict[fx.Node, int] = {}
    for node in nodes:
        before = [level[n] for n in node.all_input_nodes if n in level]
        sliced = [n for n in node.all_input_nodes if n in rules.local and n in level]
        if node in rules.reductions:
            level[node] = max(before, default=0) + 1
        elif node in rules.local or not sliced:
            level[node] = max(before, default=0)
        else:
            raise NoPasses(rules.reasons.get(node, "it needs its input whole"))
    return level


def _ancestors(
    targets: Sequence[fx.Node],
    reductions: Sequence[Reduction],
    inside: set[fx.Node],
    written: set[fx.Node],
    rules: Rules,
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [*targets, *(r.source for r in reductions)]
    while todo:
        node = todo.pop()
        if node in found or node not in inside or node in written or node not in rules.local:
            continue
        found.add(node)
        todo += rules.local[node].sources
    return found
