"""The schedule "stream": bands of rows along one axis, with line buffers, so that nothing is computed twice.

In band i every value advances to a row of its own, far enough for what reads it. Of the rows that it has, those that a
later band reads again are carried over; all else is freed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from .passes import Pass
from .rules.local import Local

Rows = dict[fx.Node, int]
MOST_FILLING_BANDS = 16


@dataclass
class Bands:
    """Which rows each value has in each band of a pass.

    Attributes:
        count: how many bands.
        stops: for each band, the row up to which each value of the pass exists after it.
        lows: for each band, the first row of each value that this band or a later one reads.
    """

    count: int
    stops: list[Rows]
    lows: list[Rows]

    def new(self, band: int, node: fx.Node) -> tuple[int, int]:
        """The rows of `node` that the band computes."""
        return (self.stops[band - 1][node] if band else 0), self.stops[band][node]


def plan_bands(run: Pass, rows: int) -> Bands:
    """Bands of `rows` rows of what has the most of them among what the pass writes and gathers from.

    The first of these bands needs many rows of the early layers: the whole field of view of the last. So bands come
    before it that fill the line buffers bit by bit.
    """
    count = band_count(run, rows)
    stops = [band_stops(run, rows, band) for band in range(count)]
    if count > 1:
        stops = filling(run, stops[0], stops[1]) + stops
    lows: list[Rows] = []
    later: Rows = {}
    for band in reversed(range(len(stops))):
        later = dict(later)
        for node, low in band_lows(run, stops[band - 1] if band else {}, stops[band]):
            later[node] = min(low, later.get(node, low))
        lows.append(later)
    return Bands(len(stops), stops, lows[::-1])


def filling(run: Pass, first: Rows, second: Rows) -> list[Rows]:
    """The stops of bands that lead up to those of the first full band, each about as large as the second is."""
    count = filling_count(run, first, second)
    return [filling_stops(run, first, step, count) for step in range(1, count)]


def filling_count(run: Pass, first: Rows, second: Rows) -> int:
    """Into how many parts the first full band is divided."""
    steps = (-(-first[n] // max(1, second[n] - first[n])) for n in run.entries)
    return min(MOST_FILLING_BANDS, max(steps, default=1))


def filling_stops(run: Pass, first: Rows, step: int, count: int) -> Rows:
    """The stops after part `step` of `count` of the first band.

    What reads whole maps alone advances evenly; what reads it goes as far as it can, but no further than `first`.
    """
    stops: Rows = {source: 0 for source, _ in run.ends}  # for a whole map that is gathered from
    made: set[fx.Node] = set()
    for rule in run.local:
        most = first[rule.node]
        read = [(i, stops[source]) for i, source in enumerate(rule.sources) if source in made]
        stops[rule.node] = _furthest(rule, most, read) if read else most * step // count
        made.add(rule.node)
    return stops


def _furthest(rule: Local, most: int, read: list[tuple[int, int]]) -> int:
    """The most rows of `rule`, up to `most`, that need no more than the given rows of the given sources."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if all(rule.need(i, 0, 0, middle)[1] <= stop for i, stop in read):
            low = middle
        else:
            high = middle - 1
    return low


def band_count(run: Pass, rows: int) -> int:
    """How many bands of `rows` rows; 0 for a pass that computes nothing in parts."""
    return -(-run.most_rows // rows)


def band_stops(run: Pass, rows: int, band: int) -> Rows:
    """The row up to which each value must exist after `band`."""
    stops: Rows = {}
    for node, size in run.ends:
        stop = min(size, -(-size * rows * (band + 1) // run.most_rows))
        stops[node] = max(stop, stops.get(node, 0))
    for rule in reversed(run.local):
        stop = stops.setdefault(rule.node, 0)
        if stop:
            for i, source in enumerate(rule.sources):
                stops[source] = max(stops.get(source, 0), rule.need(i, 0, 0, stop)[1])
    return stops


def band_lows(run: Pass, before: Rows, stops: Rows) -> Iterator[tuple[fx.Node, int]]:
    """For every read of the band, the value and the first row that is read."""
    for rule in run.local:
        start, stop = before.get(rule.node, 0), stops[rule.node]
        if stop > start:
            for i, source in enumerate(rule.sources):
                yield source, rule.need(i, 0, start, stop)[0]
    for reduction in run.reductions:
        start, stop = before.get(reduction.source, 0), stops[reduction.source]
        if stop > start:
            yield reduction.source, start
