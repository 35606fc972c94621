"""Recompute activation functions in backward instead of keeping what they return: the same gradients in fewer bytes.

An activation function over N rows of F features keeps its input alone; the linears that read its output keep nothing
and recompute it. In an MLP this frees the output, and all that composite functions (gelu_new) keep in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..config import Guarantee, TargetedConfig
from ..nn.activation import ConvertedActivation
from ..nn.activation_kind import activation_of
from ..nn.converted import swap, unswap, why_not_back, why_not_in_place
from ..nn.linear import ConvertedLinear, is_linear
from ..ops.activation import Activation


@dataclass(frozen=True, kw_only=True)
class RecomputeActivationConfig(TargetedConfig):
    """Activation functions whose outputs are recomputed in backward, and linears that take advantage of it.

    Applies to every module that computes SiLU, GELU (exact, by tanh, or quick), squared ReLU or Mish, whatever its
    class, and to `nn.Linear` and `Conv1D`. A ReLU is left alone: torch keeps its output, as does the next linear.
    """

    name: ClassVar[str] = "recompute_activation"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/recompute_activation.md"

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module) or activation_of(module) not in (None, Activation.RELU)

    def why_not(self, module: nn.Module) -> str | None:
        if getattr(module, "inplace", False):
            return "it works in place (inplace=True), so its input is gone in backward"
        return why_not_in_place(module)

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        return {} if is_linear(module) else {"activation": activation_of(module)}

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, ConvertedLinear if is_linear(module) else ConvertedActivation, self)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        return "torch"
