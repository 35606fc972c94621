"""Recompute norm outputs in backward instead of keeping them: the same gradients in fewer bytes.

A norm over N rows of D features keeps its input and one or two statistics per row; the linears that read its output
keep nothing and recompute it, once for all of them. Plain RMSNorm modules keep three tensors of N * D elements (five
in bf16, counted in its bytes), so this frees two of them per norm; `nn.LayerNorm` keeps two, of which this frees one
(two more where autocast on a GPU has it keep float32 copies).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .. import ops
from ..config import Guarantee, TargetedConfig
from ..nn.converted import Converted, original_class, swap, unswap, why_not_back, why_not_in_place
from ..nn.linear import ConvertedLinear, is_linear
from ..nn.norm import ConvertedLayerNorm, ConvertedRMSNorm
from ..nn.rms_norm import is_rms_norm, rms_norm_style
from ..ops.rms_norm.style import HALF


@dataclass(frozen=True, kw_only=True)
class RecomputeNormConfig(TargetedConfig):
    """Norms whose outputs are recomputed in backward, and linears that take advantage of it.

    Applies to `nn.RMSNorm`, `nn.LayerNorm`, every RMSNorm-like module whose forward agrees with a known formula,
    `nn.Linear` and `Conv1D`. Norms and linears work alone too, but only a converted norm that feeds a converted
    linear frees anything.
    """

    name: ClassVar[str] = "recompute_norm"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/recompute_norm.md"

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.LayerNorm) or is_rms_norm(module)

    def why_not(self, module: nn.Module) -> str | None:
        if reason := why_not_in_place(module):
            return reason
        cls = original_class(module)
        if isinstance(module, nn.LayerNorm):
            if cls.forward is not nn.LayerNorm.forward:
                return f"{cls.__name__} has a forward of its own"
            return None if len(module.normalized_shape) == 1 else "it normalizes over several dimensions"
        if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) != 1:
            return "it normalizes over several dimensions"
        if is_rms_norm(module) and rms_norm_style(module) is None:
            return f"the forward of {cls.__name__} agrees with no known RMSNorm formula"
        return None

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        if not is_rms_norm(module):
            return {}
        return {"style": rms_norm_style(module), "style_float64": rms_norm_style(module, float64=True)}

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, _mixin(module), self)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        if is_rms_norm(module):
            op = "rms_norm"
        elif isinstance(module, nn.LayerNorm) and module.weight is not None and module.weight.dtype in HALF:
            op = "layer_norm_backward"
        else:
            return "torch"
        return ops.serving(op, {p.device.type for p in module.parameters(recurse=False)})


def _mixin(module: nn.Module) -> type[Converted]:
    if is_linear(module):
        return ConvertedLinear
    return ConvertedLayerNorm if isinstance(module, nn.LayerNorm) else ConvertedRMSNorm
