"""The peak of `measure` against the allocator's own events, on whole training steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memsave.memory import MemoryProfile, measure, saved_bytes

from .helpers import allocation_peak_bytes


class Transformer(nn.Module):
    """Six layers on (B, T, D) = (4, 64, 128), with a head of 1,000 classes."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        layer = dict(d_model=128, nhead=4, dim_feedforward=512, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(**layer, activation="gelu") for _ in range(6))
        self.head = nn.Linear(128, 1000)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x)


def transformer_step(reentrant: bool | None, foreach: bool = False):
    torch.manual_seed(0)
    model = Transformer(reentrant)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach)
    x, labels = torch.randn(4, 64, 128, requires_grad=reentrant is True), torch.randint(1000, (4 * 64,))

    def step() -> None:
        nn.functional.cross_entropy(model(x).flatten(0, 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    step()  # makes the optimizer's states
    return step


def llama_step(checkpointing: bool):
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model = transformers.LlamaForCausalLM(config).train()
    if checkpointing:
        # Its name until transformers 5.22 or so, and after that.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(256, (4, 64))

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


def check(step) -> MemoryProfile:
    profile = measure(step)
    above_bytes = profile.peak_bytes - profile.baseline_bytes
    assert above_bytes == pytest.approx(allocation_peak_bytes(step), rel=0.005)
    assert sum(profile.by_category.values()) == profile.peak_bytes == sum(profile.by_module.values())
    assert saved_bytes(step) == profile.saved_bytes
    return profile


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant"])
def test_transformer(reentrant: bool | None, foreach: bool) -> None:
    profile = check(transformer_step(reentrant, foreach))
    if reentrant is None and not foreach:
        assert max(profile.by_category, key=profile.by_category.__getitem__) == "kept for backward"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])
def test_llama(checkpointing: bool) -> None:
    profile = check(llama_step(checkpointing))
    assert "model.layers.0.mlp" in profile.by_module
