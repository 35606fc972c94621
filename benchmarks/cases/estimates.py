"""The benchmark cases of `memsave.estimate`: how long a prediction takes, in how much memory, beside torch's tool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .case import Case


@dataclass(frozen=True, kw_only=True)
class EstimateCase(Case):
    """One AdamW training step of a Llama in bf16, predicted on fake tensors by several tools.

    Attributes:
        shape: settings of the model's config.
        tokens: length of the one sequence.
    """

    kind: ClassVar[str] = "estimate"

    shape: Mapping[str, int]
    tokens: int = 2048

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"model": dict(self.shape), "tokens": self.tokens}


_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_TOY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}

ESTIMATE_CASES = (
    EstimateCase(
        name="estimate_llama_8b",
        title="AdamW step of a Llama-3.1-8B shape in bf16, 2,048 tokens, predicted on fake tensors",
        shape=_LLAMA_8B,
        expected_s=150.0,
        tiny={"shape": _TOY | {"num_key_value_heads": 2}, "tokens": 16},
    ),
)
