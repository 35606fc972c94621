"""Choosing what is computed whole and what part by part, and in which parts.

The graph is cut at places where little is alive. Between two cuts, ops run whole or as one stretch in bands or tiles.
For a given most of bytes, the cheapest way through the cuts is a shortest path; the planner looks for the least bytes
at which a path is cheap enough, or for the cheapest path under a budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf

from .assembling import Stretch
from .bands import band_count
from .classify import Rules, classify
from .estimating import Cost, Estimator
from .lowering import Lowered
from .tracing import is_within, module_of, op_name

MOST_CUTS = 32
TOLERANCE = 0.02  # how near the planner goes to the fewest bytes
SMALL = 12  # ops whose maps are this many times smaller than the largest are not worth a cut
MOST_EXTRA_MACS = 0.05
MOST_EXTRA_COST = 0.25
BANDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TILES = (2, 3, 4, 5, 6, 8)
# How many multiply-accumulates could be done in the time of one call of torch, and of making one element.
CALL_MACS = {"cpu": 250_000, "cuda": 100_000_000}
ELEMENT_MACS = {"cpu": 20, "cuda": 80}


Way = tuple[float, Cost, Stretch]  # what it costs, in multiply-accumulates of the same time, and what it is


@dataclass(frozen=True)
class Wish:
    """What is asked of a plan.

    Attributes:
        schedule: "stream" or "patch".
        budget_bytes: most bytes of a call beside its inputs and weights; None for as few as are cheap.
        parts: bands, or tiles along each axis, of the sliced stretch; None to choose.
        split: the node index at which the sliced stretch ends; None to choose.
    """

    schedule: str
    budget_bytes: int | None = None
    parts: int | None = None
    split: int | None = None


class Planner:
    """Plans for one lowered graph."""

    def __init__(self, lowered: Lowered, wish: Wish) -> None:
        self.lowered, self.wish = lowered, wish
        self.estimator = Estimator(lowered)
        self.rules = self._all_rules()
        device = next((n.meta["val"].device.type for n in lowered.inputs.values()), "cpu")
        self.call_macs = CALL_MACS.get(device, CALL_MACS["cuda"])
        self.element_macs = ELEMENT_MACS.get(device, ELEMENT_MACS["cuda"])
        self.cuts = self._cuts()
        self._whole = [self.estimator.whole(a, b) for a, b in zip(self.cuts, self.cuts[1:], strict=False)]
        self.plain = self.estimator.whole(0, len(lowered.nodes))
        self.base = self.cost(self.plain)

    def _all_rules(self) -> list[Rules]:
        """The sets of axes to try: rows for bands, rows of time or space for videos; all axes for tiles."""
        rank = max((n.meta["val"].dim() for n in self.lowered.inputs.values()), default=4)
        spatial = max(1, rank - 2)
        if self.wish.schedule == "stream":
            tried: list[tuple[int, ...]] = [(axis,) for axis in range(max(1, spatial - 1))]
        else:
            tried = [tuple(range(max(0, spatial - 2), spatial))]
        return [classify(self.lowered.nodes, axes) for axes in tried]

    def cost(self, cost: Cost) -> float:
        """The estimated time, as the multiply-accumulates that could be done in it."""
        return cost.macs + self.element_macs * cost.elements + self.call_macs * cost.calls

    def _cuts(self) -> list[int]:
        """Places in the graph where little is alive, and those around ops that cannot be computed in parts."""
        live, n = self.estimator.live_bytes, len(self.lowered.nodes)
        places, gathered = {0, n}, set[int]()
        for rules in self.rules:
            for i, node in enumerate(self.lowered.nodes):
                if node in rules.reductions:  # what it reads is gathered while it is made: no cut before it
                    places.add(i + 1)
                    gathered.add(i)
                elif node in rules.reasons:
                    places |= {i, i + 1}
        places |= {i for i in range(1, n) if live[i] <= live[i - 1] and live[i] < live[i + 1]}
        return self._fewer(sorted(places - gathered | {0}))

    def _fewer(self, places: list[int]) -> list[int]:
        """At most MOST_CUTS of the places, and none where all is small: those between the cheapest neighbours go."""
        peaks = {(a, b): self.estimator.whole(a, b).peak_bytes for a, b in zip(places, places[1:], strict=False)}
        small = max(peaks.values()) / SMALL
        while len(places) > 2:
            joined = [
                (max(peaks[places[i - 1], places[i]], peaks[places[i], places[i + 1]]), i)
                for i in range(1, len(places) - 1)
            ]
            least, i = min(joined)
            if least > small and len(places) <= MOST_CUTS:
                break
            peaks[places[i - 1], places[i + 1]] = least
            del places[i]
        return places

    def _ways(self, a: int, b: int, most_bytes: float, most_extra_macs: float) -> Way | None:
        """The cheapest way from cut number `a` to `b` within `most_bytes`."""
        start, stop = self.cuts[a], self.cuts[b]
        best: Way | None = None
        if b == a + 1:
            whole = self._whole[a]
            if whole.peak_bytes <= most_bytes:
                best = (self.cost(whole), whole, Stretch(start, stop))
        if self.estimator.boundary_bytes(start, stop) > most_bytes or self._fits_whole(a, b, most_bytes):
            return best
        for cost, stretch in self._sliced_ways(start, stop, most_bytes, most_extra_macs):
            if best is None or self.cost(cost) < best[0]:
                best = (self.cost(cost), cost, stretch)
        return best

    def _fits_whole(self, a: int, b: int, most_bytes: float) -> bool:
        """Whether nothing between two cuts needs parts."""
        return all(cost.peak_bytes <= most_bytes for cost in self._whole[a:b])

    def _sliced_ways(
        self, start: int, stop: int, most_bytes: float, most_extra_macs: float = inf
    ) -> Iterator[tuple[Cost, Stretch]]:
        """For each set of axes, the cheapest parts within `most_bytes`: the largest."""
        for rules in self.rules:
            if self.estimator.passes(start, stop, rules) is None:
                continue
            if self.estimator.extra_macs(start, stop, rules) > most_extra_macs:
                continue
            found = None
            sizes = self._sizes(start, stop, rules)
            low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not: larger parts take more bytes
            while low < high:
                middle = 0 if low == 0 and high == len(sizes) else (low + high) // 2  # first whether any fits
                cost = self._sliced_cost(start, stop, rules, sizes[middle])
                if cost is None or cost.peak_bytes > most_bytes:
                    high = middle
                else:
                    low, found = middle + 1, (cost, self._stretch(start, stop, rules, sizes[middle]))
            if found is not None:
                yield found

    def _sliced_cost(self, start: int, stop: int, rules: Rules, size: int | tuple[int, ...]) -> Cost | None:
        if isinstance(size, int):
            return self.estimator.bands(start, stop, rules, size)
        return self.estimator.tiles(start, stop, rules, size)

    def _stretch(self, start: int, stop: int, rules: Rules, size: int | tuple[int, ...]) -> Stretch:
        rows, tiles = (size, ()) if isinstance(size, int) else (0, size)
        return Stretch(start, stop, rules, rows, tiles)

    def _sizes(self, start: int, stop: int, rules: Rules) -> Sequence[int | tuple[int, ...]]:
        """Sizes of parts, those that take the fewest bytes first."""
        if self.wish.schedule == "stream":
            size = self._rows_of(start, stop, rules)
            if self.wish.parts is not None:
                return [-(-size // self.wish.parts)]
            return [rows for rows in BANDS if rows < size]
        counts = [self.wish.parts] if self.wish.parts is not None else sorted(TILES, reverse=True)
        return [(count,) * len(rules.axes) for count in counts]

    def _rows_of(self, start: int, stop: int, rules: Rules) -> int:
        passes = self.estimator.passes(start, stop, rules) or []
        return max((band_count(run, 1) for run in passes if run.local), default=1)

    def path(self, most_bytes: float, most_extra_macs: float = inf) -> tuple[float, Cost, list[Stretch]] | None:
        """The cheapest way through all cuts within `most_bytes`, or None."""
        n = len(self.cuts)
        best: list[tuple[float, int, Way | None]] = [(inf if b else 0.0, -1, None) for b in range(n)]
        for b in range(1, n):
            for a in range(b):
                if best[a][0] < best[b][0] and (way := self._ways(a, b, most_bytes, most_extra_macs)):
                    if best[a][0] + way[0] < best[b][0]:
                        best[b] = (best[a][0] + way[0], a, way)
        if best[-1][0] == inf:
            return None
        stretches, peak, macs, elements, calls, b = [], 0, 0, 0, 0.0, n - 1
        while b > 0:
            _, a, way = best[b]
            assert way is not None
            stretches.append(way[2])
            peak, macs = max(peak, way[1].peak_bytes), macs + way[1].macs
            elements, calls = elements + way[1].elements, calls + way[1].calls
            b = a
        return best[-1][0], Cost(peak, macs, elements, calls), _merged(stretches[::-1])

    def least(self, *, cheap: bool) -> list[list[Stretch]]:
        """Ever smaller choices by estimate, of those that are `cheap` if so wished: the smallest last, or none."""
        most_extra_macs = MOST_EXTRA_MACS * self.plain.macs if cheap else inf
        low, high = 0.0, float(self.plain.peak_bytes)
        found: list[list[Stretch]] = []
        while high - low > max(TOLERANCE * high, self.plain.peak_bytes / 1024):
            middle = (low + high) / 2
            path = self.path(middle, most_extra_macs)
            if path is not None and (not cheap or self._is_cheap(path[0], path[1])):
                found.append(path[2])
                high = float(min(middle, path[1].peak_bytes))
            else:
                low = middle
        return found

    def ends(self) -> dict[str, str]:
        """What cannot be computed in parts, and why."""
        found: dict[str, str] = {}
        for node, reason in self.rules[0].reasons.items():
            found.setdefault(op_name(node), reason)
        return found

    def as_wished(self) -> list[Stretch] | None:
        """The stretch from the start to the wished split, or to where it pays most, in the wished parts."""
        n = len(self.lowered.nodes)
        budget = inf if self.wish.budget_bytes is None else self.wish.budget_bytes
        best: tuple[float, list[Stretch]] | None = None
        for stop in [self.wish.split] if self.wish.split is not None else self.cuts[1:]:
            rest = self.estimator.whole(stop, n).peak_bytes if stop < n else 0
            for cost, stretch in self._sliced_ways(0, stop, budget):
                peak = max(cost.peak_bytes, rest)
                if best is None or peak < best[0]:
                    best = peak, [stretch] + ([Stretch(stop, n)] if stop < n else [])
        return best[1] if best else None

    def _is_cheap(self, cost: float, made: Cost) -> bool:
        return made.macs <= (1 + MOST_EXTRA_MACS) * self.plain.macs and cost <= (1 + MOST_EXTRA_COST) * self.base


def _merged(stretches: list[Stretch]) -> list[Stretch]:
    """Neighbours that run whole as one."""
    merged: list[Stretch] = []
    for stretch in stretches:
        if merged and merged[-1].rules is None and stretch.rules is None:
            merged[-1] = Stretch(merged[-1].start, stretch.stop)
        else:
            merged.append(stretch)
    return merged


def node_after(lowered: Lowered, module: str) -> int | None:
    """The place in the graph behind the last op of `module`, or None if it has none."""
    places = [i for i, n in enumerate(lowered.nodes) if is_within(module_of(n), module)]
    return places[-1] + 1 if places else None
