"""From a linear to its low-rank form, and back to a dense one.

W is (O, D), of rank R; W ~ second first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..converted import original_class
from .factorize import factorize, factorize_heads
from .linear import LowRankLinear

_NOT_OF_THE_LINEAR = frozenset(nn.Module().__dict__) | {"_memsave", "_memsave_parts"}
_HOOKS = tuple(name for name in nn.Module().__dict__ if "hooks" in name)


def is_transposed(linear: nn.Module) -> bool:
    """Whether the weight is (D, O), as `Conv1D` of transformers stores it."""
    return not issubclass(original_class(linear), nn.Linear)


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as (O, D)."""
    weight: Tensor = linear.weight.detach()  # type: ignore[operator]
    return weight.t() if is_transposed(linear) else weight


def empty_low_rank(linear: nn.Module, rank: int, heads: int | None = None, *, lazy: bool = False) -> LowRankLinear:
    """A `LowRankLinear` in the place of `linear`: its dtype, device, flags and hooks, but no values yet."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    bias: Tensor | None = linear.bias  # type: ignore[assignment]
    out_features, in_features = weight_of(linear).shape
    _check_structure(out_features, in_features, rank, heads)
    made = LowRankLinear(
        in_features,
        out_features,
        rank,
        bias=bias is not None,
        heads=heads,
        transposed=is_transposed(linear),
        device=weight.device,
        dtype=weight.dtype,
    )
    for factor in (made.first, made.second):
        factor.requires_grad_(weight.requires_grad)
    made.bias = bias  # type: ignore[assignment]  # the very Parameter
    made.lazy = lazy
    attributes = {k: v for k, v in linear.__dict__.items() if k not in _NOT_OF_THE_LINEAR}
    made.__dict__["_dense"] = original_class(linear), attributes
    made.__dict__.update({name: linear.__dict__[name] for name in _HOOKS})
    return made


def _check_structure(out_features: int, in_features: int, rank: object, heads: object) -> None:
    """Raises ValueError for a structure that no linear of these features can have: one that was read may be any."""
    if heads is not None and not (_is_count(heads, out_features) and out_features % heads == 0):
        raise ValueError(f"heads: expected a divisor of the {out_features} output features or None, got {heads!r}")
    most = min(out_features // (heads or 1), in_features)
    if not _is_count(rank, most):
        raise ValueError(f"rank: expected a whole number from 1 to {most}, got {rank!r}")


def _is_count(value: object, most: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


@torch.no_grad()
def low_rank(
    linear: nn.Module,
    rank: int,
    heads: int | None = None,
    *,
    lazy: bool = False,
    moment: Tensor | None = None,
    damping: float = 1e-6,
) -> LowRankLinear:
    """The best `LowRankLinear` of that rank in the place of `linear`, whose bias it takes over.

    Args:
        moment: (D, D), the second moment of the inputs, for the least error on these; None for that of the weight.

    Raises:
        ValueError: see `factorize`.
    """
    weight = weight_of(linear)
    made = empty_low_rank(linear, rank, heads, lazy=lazy)
    if heads is None:
        factors = factorize(weight, rank, moment=moment, damping=damping)
    else:
        factors = factorize_heads(weight, rank, heads, moment=moment, damping=damping)
    made.first.copy_(factors.first)
    made.second.copy_(factors.second)
    return made


@torch.no_grad()
def dense(module: LowRankLinear) -> nn.Module:
    """The plain linear, of the class that it was, that computes what `module` does."""
    cls, attributes = module.__dict__["_dense"]
    made: nn.Module = cls.__new__(cls)
    nn.Module.__init__(made)
    made.__dict__.update(attributes)
    made.weight = nn.Parameter(module.dense_weight(), requires_grad=module.first.requires_grad)
    made.register_parameter("bias", module.bias)
    made.__dict__.update({name: module.__dict__[name] for name in _HOOKS})
    return made


def structure(module: LowRankLinear) -> Mapping[str, Any]:
    """What `empty_low_rank` must know besides the linear, as JSON data."""
    return {"rank": module.rank, "heads": module.heads, "lazy": module.lazy}
