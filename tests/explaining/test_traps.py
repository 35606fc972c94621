"""The traps that explain knows: each is found in a model that is in it, and not in its repaired twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import memsave

from .test_explain import batch, llama

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")


def lora(model: nn.Module, **settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft", reason="needs peft (the extra hf)")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"), **settings)


def narrow_lora(**settings: Any) -> nn.Module:
    return lora(llama().to(torch.bfloat16), **settings)


def trained_base() -> nn.Module:
    model = lora(llama())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def checkpointed(*, replaced: bool = False) -> nn.Module:
    model: Any = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if replaced:  # as a careless patch does it: checkpointing wraps the class's forward alone
        for layer in model.model.layers:
            layer.forward = partial(type(layer).forward.__wrapped__, layer)
    return model


def gpt2(attention: str = "sdpa") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Row:
    name: str
    trapped: Callable[[], nn.Module]
    free: Callable[[], nn.Module]
    settings: dict[str, Any] = field(default_factory=dict)
    free_settings: dict[str, Any] | None = None
    shape: tuple[int, int] = (2, 24)


ROWS = (
    Row("logits dominate", partial(llama, vocab_size=5000), llama),
    Row("adapters wider than the base", narrow_lora, partial(narrow_lora, autocast_adapter_dtype=False)),
    Row("adapters wider than the base", narrow_lora, lambda: lora(llama())),
    Row("the base of the adapters is trained", trained_base, lambda: lora(llama())),
    Row("activation checkpointing is off", partial(llama, num_hidden_layers=8), checkpointed),
    Row("activation checkpointing does nothing", partial(checkpointed, replaced=True), checkpointed),
    Row(
        "the optimizer makes the peak", checkpointed, checkpointed, {"optimizer": "adamw"}, {"optimizer": "sgd"}, (1, 2)
    ),
    Row(
        "attention keeps a number for each pair of tokens", partial(gpt2, "eager"), partial(gpt2, "sdpa"), shape=(2, 64)
    ),
    Row("autocast keeps copies of the weights", llama, llama, {"autocast": torch.bfloat16}, {}),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "_"))
def test_trap(row: Row) -> None:
    given = batch(row.shape)
    explanation = memsave.explain(row.trapped(), given, **{"optimizer": None, **row.settings})
    found = {trap.name: trap for trap in explanation.traps}
    assert row.name in found
    assert 0 < found[row.name].affected_bytes <= explanation.profile.peak_bytes
    assert list(explanation.traps) == sorted(explanation.traps, key=lambda trap: -trap.affected_bytes)
    settings = row.settings if row.free_settings is None else row.free_settings
    without = memsave.explain(row.free(), given, **{"optimizer": None, **settings})
    assert row.name not in {trap.name for trap in without.traps}


def test_the_bytes_of_optimizer_states_are_named() -> None:
    model = llama()
    trap = next(t for t in memsave.explain(model, batch((1, 2))).traps if "optimizer" in t.name)
    states = 2 * sum(p.nbytes for p in model.parameters())
    assert trap.affected_bytes == pytest.approx(states, abs=1000)  # and a step count for each
    assert not any("optimizer" in t.name for t in memsave.explain(model, batch((1, 2)), optimizer=None).traps)


def test_narrow_adapters_are_predicted_exactly() -> None:
    explanation = memsave.explain(narrow_lora(), batch())
    predicted = next(o for o in explanation.options if o.change == "adapters in the dtype of the base")
    real = memsave.estimate(narrow_lora(autocast_adapter_dtype=False), batch(), optimizer="adamw")
    assert (predicted.kept_bytes, predicted.peak_bytes) == (real.saved_bytes, real.peak_bytes)
