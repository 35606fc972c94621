"""Small methods that memsave does not have, one of each kind that the rewriter must serve.

Their names start with "toy_": every subclass of `MethodConfig` is known to `MethodConfig.from_dict`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memsave.config import Guarantee, MethodConfig, TargetedConfig
from memsave.nn.converted import swap, unswap
from memsave.nn.linear import ConvertedLinear, is_linear
from memsave.nn.rows import KeepRows

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


class LowRankLinear(nn.Module):
    """y = up(down(x)): a linear with other parameters than the one that it replaces; down (rank, D), up (O, rank)."""

    def __init__(self, linear: nn.Linear, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=linear.weight.requires_grad)
        self.up = nn.Parameter(up, requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        _move_hooks(linear, self)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x @ self.down.t(), self.up, self.bias)

    def dense(self) -> nn.Linear:
        linear = nn.utils.skip_init(nn.Linear, self.down.shape[1], self.up.shape[0], bias=self.bias is not None)
        linear.weight = nn.Parameter((self.up @ self.down).detach(), requires_grad=self.up.requires_grad)
        linear.bias = self.bias
        _move_hooks(self, linear)
        return linear


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give `new` the very hook tables of `old`, so that handles made before go on working."""
    for kind in _HOOKS:
        setattr(new, kind, getattr(old, kind))


@dataclass(frozen=True, kw_only=True)
class ToyLowRankConfig(TargetedConfig):
    """Replaces linears by modules with other parameters; what comes back is the dense equivalent.

    Args:
        rank: of every layer, at most.
        least: singular values below this share of the largest are left out, so that ranks differ from layer to layer.
    """

    name: ClassVar[str] = "toy_low_rank"
    guarantee: ClassVar[Guarantee] = Guarantee.APPROXIMATE
    changes_keys: ClassVar[bool] = True
    rank: int = 4
    least: float = 0.0

    def candidate(self, module: nn.Module) -> bool:
        return type(module) is nn.Linear

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        return {"weight_grad": "low rank"}

    def convert(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        u, s, v = torch.linalg.svd(module.weight.detach(), full_matrices=False)
        rank = min(self.rank, int((s >= self.least * s[0]).sum()))
        return LowRankLinear(module, v[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous())

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        assert isinstance(module, LowRankLinear)
        return {"rank": module.down.shape[0]}

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        assert isinstance(module, nn.Linear)
        (outputs, inputs), rank = module.weight.shape, state["rank"]
        return LowRankLinear(module, module.weight.new_empty(rank, inputs), module.weight.new_empty(outputs, rank))

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        assert isinstance(module, LowRankLinear)
        return module.dense()


class AdapterLinear(nn.Module):
    """y = base(x) + x delta^T: a linear around the one that was there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Parameter(torch.zeros_like(base.weight))  # (O, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.delta.t()

    def merged(self) -> nn.Linear:
        linear = copy.copy(self.base)
        weight = nn.Parameter((self.base.weight + self.delta).detach(), requires_grad=self.base.weight.requires_grad)
        linear.__dict__["_parameters"] = {**self.base._parameters, "weight": weight}
        return linear


@dataclass(frozen=True, kw_only=True)
class ToyAdapterConfig(TargetedConfig):
    """Wraps linears: the original stays within, as a child."""

    name: ClassVar[str] = "toy_adapter"
    guarantee: ClassVar[Guarantee] = Guarantee.ADAPTER
    changes_keys: ClassVar[bool] = True

    def candidate(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def convert(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, nn.Linear)
        return AdapterLinear(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        assert isinstance(module, AdapterLinear)
        return module.merged() if adapters == "merge" else module.base


@dataclass(frozen=True, kw_only=True)
class ToyRootConfig(MethodConfig):
    """A method of model scope: attaches something to the root."""

    name: ClassVar[str] = "toy_root"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    every: int = 1

    def why_not(self, module: nn.Module) -> str | None:
        return "it has a bell already" if hasattr(module, "bell") and "_memsave" not in module.__dict__ else None

    def convert(self, module: nn.Module) -> nn.Module:
        module.__dict__["bell"] = self.every
        return module

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        del module.__dict__["bell"]
        return module


@dataclass(frozen=True, kw_only=True)
class _ToyKeepConfig(TargetedConfig):
    """Sets one part of the one Linear: every row is kept, so that nothing changes."""

    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    keep: ClassVar[KeepRows]

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module)

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        return {"keep": self.keep}

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, ConvertedLinear, self)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)


@dataclass(frozen=True, kw_only=True)
class ToyKeepPpsConfig(_ToyKeepConfig):
    """Keeps every row, by one estimator."""

    name: ClassVar[str] = "toy_keep_pps"
    keep: ClassVar[KeepRows] = KeepRows(1.0, 1, "pps")


@dataclass(frozen=True, kw_only=True)
class ToyKeepCrsConfig(_ToyKeepConfig):
    """Keeps every row, by another estimator."""

    name: ClassVar[str] = "toy_keep_crs"
    keep: ClassVar[KeepRows] = KeepRows(1.0, 1, "crs")


@dataclass(frozen=True, kw_only=True)
class ToyKeepPpsAgainConfig(_ToyKeepConfig):
    """Sets the same part as `ToyKeepPpsConfig`, in the same way: no conflict."""

    name: ClassVar[str] = "toy_keep_pps_again"
    keep: ClassVar[KeepRows] = KeepRows(1.0, 1, "pps")
