"""Keep one bit per element for dropout, and recompute dropped-out tensors in backward instead of keeping them.

On the CPU torch's dropout keeps noise as large as its input, on a GPU a byte per element. One bit suffices. Where the
input itself can be recomputed, so can the output: the linears that read it keep nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from .. import ops
from ..config import Guarantee, TargetedConfig
from ..nn.converted import original_class, swap, unswap, why_not_back, why_not_in_place
from ..nn.dropout import ConvertedDropout
from ..nn.linear import ConvertedLinear, is_linear


@dataclass(frozen=True, kw_only=True)
class RecomputeDropoutConfig(TargetedConfig):
    """Dropout that keeps bits, and linears that take advantage of it.

    Applies to `nn.Dropout`, `nn.Linear` and `Conv1D`. torch draws the mask: the random stream, the mask and the output
    are those of the plain module, bit for bit. `F.dropout`, called as a function, is out of reach.
    """

    name: ClassVar[str] = "recompute_dropout"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/recompute_dropout.md"

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module) or isinstance(module, nn.Dropout)

    def why_not(self, module: nn.Module) -> str | None:
        if reason := why_not_in_place(module):
            return reason
        cls = original_class(module)
        if isinstance(module, nn.Dropout):
            if cls.forward is not nn.Dropout.forward:
                return f"{cls.__name__} has a forward of its own"
            if module.inplace:
                return "it overwrites its input (inplace=True)"
        return None

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, ConvertedLinear if is_linear(module) else ConvertedDropout, self)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)

    def backend(self, module: nn.Module) -> str:
        if is_linear(module):
            return "torch"
        # A dropout has no parameters that tell its device: the GPU is the likely one where there is one.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return ops.backends()["masked_scale"][device]["active"]
