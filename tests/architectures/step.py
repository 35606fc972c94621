"""One training step of a model, and how close two of them are.

Errors are norms of differences, for each tensor. A gradient that is zero but for rounding, as that of a key's bias, has
no size of its own to compare with: the norm of every tensor counts as at least `FLOOR` of the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-2


@dataclass(frozen=True)
class Step:
    """What one training step gave, in fp64.

    Attributes:
        outputs: the loss and the logits of the last micro-batch.
        gradients: of every parameter that has one, by name.
        random_state: of torch's default generator afterwards.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    random_state: Tensor


def train(
    model: Any, *batches: dict[str, Tensor], autocast: bool = False, run: Any = None, backward: bool = True
) -> Step:
    """Forward and backward of each micro-batch, always from the same seed; `run` is called in the place of `model`."""
    model.zero_grad()
    torch.manual_seed(5)
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = (model if run is None else run)(**batch)
        if backward:
            output.loss.backward()
    outputs = {"loss": output.loss.detach().double(), "logits": output.logits.detach().double()}
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return Step(outputs, gradients, torch.get_rng_state())


def micro_batches(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch of two in two."""
    return [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]


def in_dtype(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch with its images or sounds in `dtype`."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def assert_same(found: Step, expected: Step, tolerance: float = 1e-5) -> None:
    """Every output and gradient within `tolerance`, relative."""
    for name, error, size in _errors(found, expected):
        assert error <= tolerance * size, f"{name}: {error / size:.2g} from the plain model's"


def assert_within_twice(found: Step, plain: Step, truth: Step, dtype: torch.dtype) -> None:
    """Every output and gradient at most twice as far from the truth as the plain model's.

    Both errors get a rounding step of `dtype` added, so that a lucky plain model does not count.
    """
    rounding = torch.finfo(dtype).eps
    for (name, error, size), (_, budget, _) in zip(_errors(found, truth), _errors(plain, truth), strict=True):
        ratio = (error + rounding * size) / (budget + rounding * size)
        assert ratio <= 2, f"{name}: {ratio:.2f}x the plain model's error"


def _errors(found: Step, expected: Step) -> Sequence[tuple[str, float, float]]:
    """(name, norm of the difference, norm to compare it with) of every output and gradient."""
    assert list(found.gradients) == list(expected.gradients)
    largest = max((float(gradient.norm()) for gradient in expected.gradients.values()), default=0.0)
    rows = []
    for mine, theirs, floor in (
        (found.outputs, expected.outputs, 0.0),
        (found.gradients, expected.gradients, FLOOR * largest),
    ):
        rows += [(n, float((mine[n] - theirs[n]).norm()), max(float(theirs[n].norm()), floor)) for n in theirs]
    return rows
