"""The correctness gates of the benchmarks of models: gradients beside fp64. Ops are checked by `tests.harness`."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Set
from typing import Protocol

import torch
from torch import Tensor

ERROR_BUDGET = 2.0
OWN_TOLERANCE = 1e-4  # relative, of the gradients of one function by two backends in fp32
DRAWS = 12
DISTANCE_BUDGET = 1.5
STANDARD_ERRORS = 6.0
ROUNDING = 1e-3  # relative, of a gradient that hardly varies between draws


class CheckFailed(Exception):
    """A variant does not compute what it promises."""


class Differentiable(Protocol):
    def gradients(self) -> dict[str, Tensor]: ...

    def sampled(self) -> set[str]: ...


def check_exact(
    variant: str,
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    sampled: Set[str],
    dtype: torch.dtype,
) -> float:
    """The largest error of a gradient (or output) that is not sampled, over the plain model's in the same dtype.

    Both errors get a rounding step of its norm added, so that a lucky plain model does not count.
    """
    if found.keys() != truth.keys():
        raise CheckFailed(f"{variant}: gradients of {sorted(found.keys() ^ truth.keys())} are missing or too many")
    largest = 0.0
    for name in truth.keys() - sampled:
        step = torch.finfo(dtype).eps * truth[name].norm() + torch.finfo(dtype).tiny
        ratio = float(((found[name] - truth[name]).norm() + step) / ((plain[name] - truth[name]).norm() + step))
        if not ratio <= ERROR_BUDGET:
            raise CheckFailed(f"{variant}: its result for {name} has {ratio:.2f}x the plain model's error")
        largest = max(largest, ratio)
    return largest


def check_own(variant: str, found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """The largest relative distance of a gradient to the one that the same variant has in plain PyTorch."""
    if not found or found.keys() != reference.keys():
        raise CheckFailed(f"{variant}: gradients of {sorted(found.keys() ^ reference.keys())} are missing or too many")
    largest = 0.0
    for name, gradient in found.items():
        scale = float(reference[name].norm())
        distance = float((gradient - reference[name]).norm()) / scale if scale else float(gradient.norm())
        if not distance <= OWN_TOLERANCE:
            raise CheckFailed(f"{variant}: its gradient of {name} is {distance:.1e} off what plain PyTorch gives")
        largest = max(largest, distance)
    return largest


def check_unbiased(variant: str, step: Differentiable, truth: Mapping[str, Tensor]) -> float:
    """The squared distance of the mean of some draws to the exact gradient, over what chance alone gives: about 1.

    Also checked is the length of each along the exact gradient, where a wrong scale shows most.
    """
    names = sorted(step.sampled())
    directions = {name: truth[name] / truth[name].norm() for name in names}
    sums = {name: torch.zeros_like(truth[name]) for name in names}
    lengths: dict[str, list[float]] = {name: [] for name in names}  # along the exact gradient, 1 is right
    squares = 0.0
    for _ in range(DRAWS):
        gradients = step.gradients()
        for name in names:
            found = gradients[name] / truth[name].norm()
            sums[name] += found
            squares += float(found.square().sum())
            lengths[name].append(float((found * directions[name]).sum()))

    for name in names:
        spread = max(statistics.stdev(lengths[name]) / DRAWS**0.5, ROUNDING)
        off = abs(statistics.fmean(lengths[name]) - 1) / spread
        if not off <= STANDARD_ERRORS:
            raise CheckFailed(f"{variant}: along the gradient of {name}, the mean is {off:.1f} standard errors off")
    means = {name: total / DRAWS for name, total in sums.items()}
    variance = (squares - DRAWS * sum(float(mean.square().sum()) for mean in means.values())) / (DRAWS - 1)
    ratio = sum(float((means[name] - directions[name]).square().sum()) for name in names) / (variance / DRAWS)
    if not ratio <= DISTANCE_BUDGET:
        raise CheckFailed(f"{variant}: the mean of {DRAWS} draws is {ratio:.2f}x as far away as chance allows, squared")
    return ratio
