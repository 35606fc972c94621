"""One training step with every method that trains, and what a user would pick instead: the picture of the README.

B sequences of T tokens; long enough that sparse attention, sampling and logits all matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn

import memsave

from . import adapters, models
from .training import StepCase
from .variants import (
    ALL,
    ALL_SAMPLED,
    CHECKPOINT,
    COMPILED,
    EXACT,
    PLAIN,
    SAMPLED_DOWN,
    SAMPLED_PROJECTIONS,
    SELECTIVE,
    Variant,
    enable_checkpointing,
)


@dataclass(frozen=True, kw_only=True)
class OwnVariant(Variant):
    """A way to train that computes another function than the plain model, or trains other parameters.

    Its gradients are compared with those that it has in plain PyTorch (`memsave.ops.use_reference()`).
    """


@dataclass(frozen=True, kw_only=True)
class MethodsCase(StepCase):
    """A training step in ways of every kind; not each of them computes what the plain model does."""

    kind: ClassVar[str] = "methods"


def _checkpointed(model: nn.Module) -> None:
    memsave.convert_model(model)
    enable_checkpointing(model)


def _approximate(*configs: memsave.MethodConfig) -> Callable[[nn.Module], None]:
    def apply(model: nn.Module) -> None:
        memsave.convert_model(model)
        ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(2))
        memsave.convert_model(model, configs, calibration=[{"input_ids": ids.to(model.device)}])

    return apply


def _checkpointed_lora(model: nn.Module) -> None:
    adapters.LORA_16.apply(model)
    model.enable_input_require_grads()
    enable_checkpointing(model)


_SPARSE = memsave.SparseMHAConfig(keep=0.125, target_modules=r".*self_attn")
_ROUTED = memsave.RoutedFFNConfig(blocks=4, active=2, clustering="coactivation", target_modules=r".*\.mlp")

METHODS_CASES: tuple[MethodsCase, ...] = (
    MethodsCase(
        name="methods",
        title="full training step of a Llama (2 layers, 256 wide, 4,096 classes), fp32, AdamW",
        devices=("cpu", "cuda"),
        expected_s=360.0,
        model=partial(models.llama_wide, num_hidden_layers=2),
        shape=(1, 2048),
        variants=(
            *(PLAIN, CHECKPOINT, SELECTIVE, COMPILED),
            *(EXACT, ALL, Variant(name="memsave exact + activation checkpointing", apply=_checkpointed)),
            *(ALL_SAMPLED, SAMPLED_DOWN, SAMPLED_PROJECTIONS),
            OwnVariant(name="memsave exact + sparse_mha 1/8", apply=_approximate(_SPARSE)),
            OwnVariant(name="memsave exact + routed_ffn 2 of 4", apply=_approximate(_ROUTED)),
            OwnVariant(name="memsave exact + both of them", apply=_approximate(_SPARSE, _ROUTED)),
            OwnVariant(name="PEFT LoRA, r = 16", apply=adapters.LORA_16.apply),
            OwnVariant(name="PEFT LoRA + activation checkpointing", apply=_checkpointed_lora),
            OwnVariant(name="memsave exact + PEFT LoRA", apply=adapters.LORA_EXACT.apply),
            OwnVariant(name="memsave exact + SHiRA", apply=adapters.SHIRA_EXACT.apply),
            OwnVariant(name="memsave exact + LaMDA, r = 32", apply=adapters.LAMDA_EXACT.apply),
            OwnVariant(name="memsave all + LaMDA, r = 32", apply=adapters.LAMDA_ALL.apply),
        ),
        gate={"shape": (1, 256)},
        tiny={
            "model": partial(models.llama_wide, num_hidden_layers=1, vocab_size=256, intermediate_size=256),
            "shape": (1, 128),
            "gate": {},
        },
    ),
)
