"""One attention mask for all layers of a transformers model, and attention on the CPU that keeps no more than it must.

SDPA turns a boolean mask (B, 1, T, T) into an additive one in every layer, and each layer keeps its own for backward.
Here the layers share it. On the CPU, keys and values of grouped heads are not repeated beside a mask, and attention
with dropout keeps one bit per probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..config import Guarantee, MethodConfig


@dataclass(frozen=True, kw_only=True)
class ShareMaskConfig(MethodConfig):
    """Attention layers that share one additive mask, for the transformers models in a model that use SDPA.

    Models that use another attention implementation (eager, flash, flex) keep it.
    """

    name: ClassVar[str] = "share_mask"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/share_mask.md"

    def applies(self, model: nn.Module) -> bool:
        if not any(cls.__name__ == "PreTrainedModel" for m in model.modules() for cls in type(m).__mro__):
            return False
        from ..integrations import attention

        return attention.takes_attention(model)

    def why_not(self, module: nn.Module) -> str | None:
        from ..integrations import attention

        return attention.why_not(module)

    def convert(self, module: nn.Module) -> nn.Module:
        from ..integrations import attention

        attention.use(module)
        return module

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        from ..integrations import attention

        attention.use_no_more(module)
        return module

    def __reduce__(self) -> tuple[Callable[[], ShareMaskConfig], tuple[()]]:
        # A process that reads a pickled model must know the attention function that its config names.
        return _registered, ()


def _registered() -> ShareMaskConfig:
    from ..integrations import attention

    attention.register()
    return ShareMaskConfig()
