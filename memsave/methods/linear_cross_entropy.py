"""The loss of a language model without the logits of all tokens: its head returns lazy logits.

`F.cross_entropy` of them is computed from the hidden states, a chunk of tokens after another. Sources: Wijmans et al.,
"Cut Your Losses in Large-Vocabulary Language Models", 2024; Hsu et al., "Liger Kernel", 2024.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..config import Guarantee, TargetedConfig
from ..nn.converted import original_class, swap, unswap, why_not_back, why_not_in_place
from ..nn.lazy_logits import LazyOutput
from ..nn.linear import ConvertedLinear, is_linear


@dataclass(frozen=True, kw_only=True)
class LinearCrossEntropyConfig(TargetedConfig):
    """Heads whose logits are made only where something other than `F.cross_entropy` asks for their values.

    Without target_modules, the output embeddings of every transformers model in the model, if they are `nn.Linear`.

    Args:
        min_logits_bytes: logits of fewer bytes (in the loss's dtype) are made at once, as in the plain model. So are
            logits that take no more bytes than the gradients that the loss keeps instead.

    Raises:
        ValueError: min_logits_bytes is no whole number of at least 0.
    """

    name: ClassVar[str] = "linear_cross_entropy"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    default: ClassVar[bool] = True
    docs: ClassVar[str] = "docs/linear_cross_entropy.md"

    min_logits_bytes: int = 4 * 2**20

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.min_logits_bytes
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(
                f"LinearCrossEntropyConfig.min_logits_bytes: expected a whole number of at least 0, got {size!r}"
            )

    def candidate(self, module: nn.Module) -> bool:
        return is_linear(module) and issubclass(original_class(module), nn.Linear)

    def found_in(self, modules: Collection[nn.Module]) -> list[nn.Module]:
        return [head for module in modules for head in _heads(module) if self.candidate(head)]

    def why_not(self, module: nn.Module) -> str | None:
        if any(p.is_complex() for p in module.parameters(recurse=False)):
            return "its weight is complex; cross entropy is of real logits"
        return why_not_in_place(module)

    def parts(self, module: nn.Module) -> Mapping[str, object]:
        return {"output": LazyOutput(self.min_logits_bytes)}

    def convert(self, module: nn.Module) -> nn.Module:
        return swap(module, ConvertedLinear, self)

    def why_not_restore(self, module: nn.Module) -> str | None:
        return why_not_back(module)

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        return unswap(module, self.name)


def _heads(module: nn.Module) -> Iterator[nn.Module]:
    """The head that a transformers model names; PEFT's `modules_to_save` wraps it and trains a copy."""
    named = getattr(module, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if isinstance(head, nn.Module):
        yield head
        copies = getattr(head, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict):
            yield from copies.values()
