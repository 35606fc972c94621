"""One forward and backward of any model, and how far two of them are apart."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

SEED = 5
TOLERANCE = 1e-5
FLOOR = 1e-2
"""A gradient that is zero but for rounding has no size of its own: each counts as at least this part of the largest."""


@dataclass
class Step:
    """What one step gave: the floating outputs by their place, and the gradient of every parameter that has one."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)


def lively(model: nn.Module) -> nn.Module:
    """Random values that are large enough for every layer to change the loss, as no initialization of zeros does."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
                parameter.nan_to_num_(0.0, 1.0, -1.0)
            else:
                fan = parameter[0].numel() if parameter.dim() != 3 or parameter.shape[-1] < 16 else parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(max(fan, 1)))
    return model


def rounded_anew(model: nn.Module) -> nn.Module:
    """Every value moved by up to half of its last bit: what this changes is no more certain than that."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                step = torch.finfo(parameter.dtype).eps / 2
                parameter.mul_(1 + step * (2 * torch.rand(parameter.shape, generator=generator) - 1))
    return model


def seed() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def call(model: Any, batch: dict[str, Any]) -> Any:
    """A forward, from the same random state every time."""
    seed()
    return model(**batch)


def forward(model: Any, batch: dict[str, Any]) -> Step:
    """A forward without gradients."""
    with torch.no_grad():
        return Step({name: value.double() for name, value in _tensors(call(model, batch)).items()})


def train(model: Any, batch: dict[str, Any]) -> Step:
    """Forward and backward."""
    model.zero_grad()
    output = call(model, batch)
    found = _tensors(output)
    objective(found).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return Step({name: value.detach().double() for name, value in found.items()}, gradients)


def loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """The scalar that `train` runs backward from."""
    return objective(_tensors(call(model, batch)))


def objective(outputs: dict[str, Tensor]) -> Tensor:
    """The loss if there is one, else a random combination of all outputs.

    Raises:
        ValueError: no output depends on a parameter.
    """
    reached = {name: value for name, value in outputs.items() if value.requires_grad}
    if "loss" in reached and reached["loss"].numel() == 1 and bool(torch.isfinite(reached["loss"].detach())):
        return reached["loss"].reshape(()).float()
    if not reached:
        raise ValueError("no output depends on a parameter")
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for value in reached.values():
        weights = torch.randn(value.shape, generator=generator)
        finite = torch.isfinite(value.detach())
        total = total + (torch.where(finite, value.float(), 0.0) * weights).sum() / math.sqrt(value.numel() or 1)
    return total


def _tensors(output: Any) -> dict[str, Tensor]:
    """The floating tensors in a model's output, by their place."""
    leaves, _ = pytree.tree_flatten_with_path(_plain(output))
    named = {_name(path): leaf for path, leaf in leaves}
    return {n: v for n, v in named.items() if isinstance(v, Tensor) and v.is_floating_point()}


def _plain(value: Any) -> Any:
    """Nested outputs as dicts; caches, which belong to no training step, left out."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, Tensor) else None


def _name(path: Any) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def difference(found: Step, expected: Step, tolerance: float = TOLERANCE, skip: frozenset[str] = frozenset()) -> str:
    """What differs most, in words; "" if every output and gradient is within `tolerance`, relative to its norm.

    skip: gradients that need not be the same.
    """
    error, text = worst(found, expected, skip)
    return text if error > tolerance else ""


def worst(found: Step, expected: Step, skip: frozenset[str] = frozenset()) -> tuple[float, str]:
    """The largest difference of an output or a gradient, relative to its norm, and which it is, in words."""
    if found.outputs.keys() != expected.outputs.keys():
        return math.inf, f"outputs {sorted(found.outputs)} instead of {sorted(expected.outputs)}"
    if found.gradients.keys() != expected.gradients.keys():
        others = sorted(found.gradients.keys() ^ expected.gradients.keys())
        return math.inf, f"gradients of {others[:3]} on one side only"
    largest = max((float(g.norm()) for g in expected.gradients.values() if g.isfinite().all()), default=0.0)
    rows = [(_error(found.outputs[name], value, 0.0), f"output {name}") for name, value in expected.outputs.items()]
    rows += [
        (_error(found.gradients[name], value, FLOOR * largest), f"gradient {name}")
        for name, value in expected.gradients.items()
        if name not in skip
    ]
    error, name = max(rows, default=(0.0, ""), key=lambda row: row[0])
    return error, f"{name}: {error:.2g} from the plain model's"


def _error(mine: Tensor, theirs: Tensor, floor: float) -> float:
    if mine.shape != theirs.shape:
        return math.inf
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return math.inf
    mine, theirs = mine[finite], theirs[finite]
    size = max(float(theirs.norm()), floor)
    error = float((mine - theirs).norm())
    return 0.0 if error == 0 else error / size if size else math.inf


def finite(step: Step, expected: Step) -> str:
    """What is not finite, or of another shape than in `expected`, in words; "" if nothing."""
    for name, value in step.gradients.items():
        if not value.isfinite().all():
            return f"the gradient of {name} is not finite"
    for name, value in expected.outputs.items():
        if name not in step.outputs or step.outputs[name].shape != value.shape:
            return f"output {name} is missing or of another shape"
        if value.isfinite().all() and not step.outputs[name].isfinite().all():
            return f"output {name} is not finite"
    return ""
