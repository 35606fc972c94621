"""What recognizing a module by running its forward needs: which attributes count, and how many inputs it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from numbers import Real

import torch
from torch import nn

_COMMON = frozenset(nn.Module().__dict__)


def own_attributes(module: nn.Module) -> tuple[tuple[str, object], ...] | None:
    """The attributes that the module has beyond those of every module, sorted; None if one is no plain value."""
    own = {k: v for k, v in module.__dict__.items() if k not in _COMMON and not k.startswith("_memsave")}
    plain = all(isinstance(v, (str, Real, torch.dtype)) for v in own.values())
    return tuple(sorted(own.items(), key=lambda item: item[0])) if plain else None


def takes_one_input(forward: Callable[..., object]) -> bool:
    """Whether a class's forward takes self and one input."""
    return len(inspect.signature(forward).parameters) == 2
