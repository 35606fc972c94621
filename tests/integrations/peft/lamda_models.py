"""What the tests of LaMDA share: small models, and adapters with something learned."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from memsave.integrations.peft.lamda import LaMDAConfig, LaMDALinear

D, OUT, RANK = 24, 40, 12
LINEARS_PER_LAYER = 7


class Block(nn.Module):
    """Two linears and, between them, what keeps its output for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, OUT), nn.Linear(OUT, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Conv1DBlock(nn.Module):
    """GPT-2's linear, whose weight is (D, OUT)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Conv1D(OUT, D)
        nn.init.normal_(self.up.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def block(dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(0)
    return Block().to(dtype)


def config(**given: Any) -> LaMDAConfig:
    return LaMDAConfig(**{"r": RANK, "target_modules": ["up", "down"], "svd": "exact", **given})


def adapted(model: nn.Module | None = None, adapter_name: str = "default", **given: Any) -> peft.PeftModel:
    return peft.get_peft_model(block() if model is None else model, config(**given), adapter_name=adapter_name)


def layers(model: nn.Module) -> list[LaMDALinear]:
    return [module for module in model.modules() if isinstance(module, LaMDALinear)]


@torch.no_grad()
def learn(model: nn.Module, seed: int = 1, *, only_what_trains: bool = False) -> None:
    """Give S and B of every adapter values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        for name, s in layer.memsave_lamda_S.items():
            s.copy_(torch.randn(s.shape, generator=generator) * 0.1)
            for segment in layer.segments(name):
                if only_what_trains and not segment.requires_grad:
                    continue
                segment.add_(torch.randn(segment.shape, generator=generator).to(segment.dtype) * 0.01)


def rows(count: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, count // 2, D, generator=torch.Generator().manual_seed(2)).to(dtype)


def llama(dtype: torch.dtype = torch.float32, num_layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        use_cache=False,
    )
    return LlamaForCausalLM(settings).to(dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}
