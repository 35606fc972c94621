"""The benchmark case of what each architecture keeps for backward, plain and after bare `convert_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.architectures.models import ARCHITECTURES, TINY, Architecture, Size

from .case import Case

# Logits have about the share that they have in large models: more classes, but also more layers.
SIZE = Size(
    vocabulary=2048, hidden=256, intermediate=1024, layers=4, heads=4, tokens=512, image=224, patch=16, frames=1000
)


@dataclass(frozen=True, kw_only=True)
class KeptCase(Case):
    """Forward and loss of every architecture, in fp32 and in bf16.

    Attributes:
        dropout: the probability, of the architectures that have any, by name; the others have none.
    """

    kind: ClassVar[str] = "kept"

    architectures: tuple[Architecture, ...] = ARCHITECTURES
    size: Size = SIZE
    dropout: Mapping[str, float] = field(default_factory=lambda: {"BERT": 0.1, "GPT-2": 0.1})

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"shape": [self.size.batch, self.size.tokens, self.size.hidden]}


KEPT_CASES = (
    KeptCase(
        name="kept",
        title=f"kept for backward by {SIZE.layers} layers, where the model reads one with a padding mask",
        expected_s=60.0,
        tiny={"size": TINY},
    ),
)
