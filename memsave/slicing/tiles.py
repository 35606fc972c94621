"""The schedule "patch": tiles of the output, each computed from all it needs of the input, halos again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from torch import fx

from .passes import Pass
from .regions import Region, is_empty, union


def plan_tiles(run: Pass, counts: Sequence[int]) -> list[dict[fx.Node, Region]]:
    """For each tile, the region of every value that is computed; `counts` are the tiles along each axis.

    What is gathered has an entry of its own: the part of its source that the tile adds, which no other tile adds.
    """
    return [tile_regions(run, counts, place) for place in product(*map(range, counts))]


def tile_regions(run: Pass, counts: Sequence[int], place: Sequence[int]) -> dict[fx.Node, Region]:
    regions: dict[fx.Node, list[Region]] = {}
    sizes = {rule.node: tuple(rule.size(axis) for axis in range(len(counts))) for rule in run.local}
    own: dict[fx.Node, Region] = {}
    for target in run.targets:
        region = tuple(_share(n, c, i) for n, c, i in zip(sizes[target], counts, place, strict=True))
        if not is_empty(region):
            regions[target] = [region]
    for reduction in run.reductions:
        region = tuple(_share(n, c, i) for n, c, i in zip(reduction.source_size, counts, place, strict=True))
        if is_empty(region):
            continue
        own[reduction.node] = region
        regions.setdefault(reduction.source, []).append(region)
    found: dict[fx.Node, Region] = {}
    for rule in reversed(run.local):
        wanted = regions.get(rule.node)
        if not wanted:
            continue
        found[rule.node] = out = union(wanted)
        for i, source in enumerate(rule.sources):
            regions.setdefault(source, []).append(rule.needs(i, out))
    return found | own


def _share(size: int, count: int, place: int) -> tuple[int, int]:
    """The rows of tile `place` of `count`."""
    return -(-size * place // count), -(-size * (place + 1) // count)
