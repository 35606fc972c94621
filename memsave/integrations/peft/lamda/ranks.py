"""LaMDA++: which layer gets how much of the total rank.

The paper's exact rule is not public, so this is memsave's: a layer whose top r singular values hold less of its weight
gets more rank. E_l is the energy held, need_l = (1 - E_l) / mean(1 - E), and the rank is r * need_l, rounded so that
the sum over L layers is r * L exactly. Another rule is a function of the same arguments, given to `rank_pattern_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor

from torch import nn

from .config import LaMDAConfig
from .decomposition import energy
from .layer import matrix_of, weight_of
from .targets import checked_targets

# (energies, r, limits) -> ranks, one for each layer; limits are (least, largest) of each.
RankRule = Callable[[Sequence[float], int, Sequence[tuple[int, int]]], Sequence[int]]


def energy_ranks(energies: Sequence[float], r: int, limits: Sequence[tuple[int, int]]) -> list[int]:
    """Ranks within `limits` whose sum is r * len(energies); with equal limits, less energy never means less rank.

    Where limits bind, all needs are scaled by one factor until the limited ranks add up; what rounding down leaves goes
    to the largest remainders, and where these are equal to the least energy, then to the first layer. Without any need
    all get r.

    Raises ValueError if the limits do not enclose r.
    """
    for low, high in limits:
        if not low <= r <= high:
            raise ValueError(f"energy_ranks: expected every layer's limits to enclose r = {r}, got ({low}, {high})")
    needs = [max(0.0, 1.0 - e) for e in energies]
    mean = sum(needs) / len(needs) if needs else 0.0
    if mean <= 0:
        return [r] * len(needs)
    needs = [need / mean for need in needs]
    exact = _scaled(needs, r, limits)
    ranks = [min(max(floor(x), low), high) for x, (low, high) in zip(exact, limits, strict=True)]
    left = r * len(ranks) - sum(ranks)
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i] - exact[i], energies[i], i))  # largest remainder first
    while left:
        step = 1 if left > 0 else -1
        for i in order if left > 0 else reversed(order):
            if left and limits[i][0] <= ranks[i] + step <= limits[i][1]:
                ranks[i] += step
                left -= step
    return ranks


def _scaled(needs: Sequence[float], r: int, limits: Sequence[tuple[int, int]]) -> list[float]:
    """clamp(scale * need) with the one scale at which the sum is r * len(needs); r itself where no limit binds."""

    def at(scale: float) -> list[float]:
        return [
            min(max(scale * need, float(low)), float(high)) for need, (low, high) in zip(needs, limits, strict=True)
        ]

    total = float(r * len(needs))
    if [r * need for need in needs] == at(float(r)):
        return at(float(r))
    below, above = 0.0, float(r)
    while sum(at(above)) < total and above < 1e30:
        above *= 2
    for _ in range(100):  # bisection down to neighbouring floats
        middle = (below + above) / 2
        below, above = (middle, above) if sum(at(middle)) < total else (below, middle)
    return at(above)


def rank_pattern_for(model: nn.Module, config: LaMDAConfig, rule: RankRule = energy_ranks) -> dict[str, int]:
    """{module name: rank} of the modules that `config` targets in `model`, by `rule`: for `config.rank_pattern`.

    Raises memsave's errors (ValueErrors) for a model or a config that LaMDA cannot use, and ValueError if the rule's
    ranks do not add up to r for each layer or leave the limits. The model is not changed.
    """
    targets = checked_targets(model, config)
    low, high = config.rank_limits()
    matrices = {name: matrix_of(layer, weight_of(layer)) for name, layer in targets.items()}
    limits = [(min(low, *m.shape), min(high, *m.shape)) for m in matrices.values()]
    ranks = list(rule([energy(m, config.r, config) for m in matrices.values()], config.r, limits))
    if len(ranks) != len(limits) or sum(ranks) != config.r * len(limits):
        expected = f"{len(limits)} ranks that add up to {config.r * len(limits)}"
        raise ValueError(f"rank_pattern_for: expected {expected} from the rule, got {ranks}")
    for name, rank, (least, most) in zip(targets, ranks, limits, strict=True):
        if not least <= rank <= most:
            raise ValueError(f"rank_pattern_for: expected a rank in [{least}, {most}] for {name}, got {rank}")
    return dict(zip(targets, ranks, strict=True))
