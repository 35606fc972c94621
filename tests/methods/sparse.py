"""Models for the tests of SparseMHAConfig: a small Llama, batches, and what counts calls of sparse attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from memsave import SparseMHAConfig

from ..architectures.models import ARCHITECTURES, TINY

SIZE = dataclasses.replace(TINY, tokens=80)
LLAMA = next(a for a in ARCHITECTURES if a.name == "Llama")


def config(**settings: Any) -> SparseMHAConfig:
    usual = {"target_modules": r".*", "keep": 8, "granularity": "token", "block_size": 16, "dense_below": 0}
    return SparseMHAConfig(**{**usual, **settings})


def llama() -> Any:
    return LLAMA.make(SIZE)


def batch(padding: str | None = None, seed: int = 0) -> dict[str, Tensor]:
    given = LLAMA.batch(SIZE, padding)
    return given | {"input_ids": (given["input_ids"] + seed) % SIZE.vocabulary}


class Block(nn.Module):
    """Attention of torch with a residual connection, (B, T, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return y


def blocks(count: int = 2) -> Any:
    """Attention of torch alone, whose parameters are large enough that it is no average."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(count)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return model


def tokens(seed: int = 0, rows: int = 80) -> Tensor:
    return torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(seed))


def codebooks(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("codebook")}
