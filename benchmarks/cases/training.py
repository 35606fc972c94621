"""The benchmark cases of the methods, as data: a model, and the ways to train it that are compared.

B sequences of T tokens, d features. The first variant is always the plain model, the others are memsave's and what a
user would pick instead. A new method adds its cases to TRAINING_CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import models
from .case import Case, short
from .models import WIDTH, direct, from_embeddings, padded
from .variants import (
    ACTIVATIONS,
    ALL,
    ALL_SAMPLED,
    CHECKPOINT,
    CHECKPOINT_BLOCKS,
    COMPILED,
    EXACT,
    LAZY_LOGITS,
    LIGER,
    MLPS,
    NORMS,
    PLAIN,
    SAMPLED,
    SAMPLED_ALONE,
    SAMPLED_DOWN,
    SAMPLED_ENCODER,
    SAMPLED_LESS,
    SAMPLED_LORA,
    SAMPLED_PROJECTIONS,
    SELECTIVE,
    SHARED,
    Variant,
)


@dataclass(frozen=True, kw_only=True)
class ModelCase(Case):
    """One model, side by side in several variants.

    Attributes:
        model: makes the plain model in fp32; called after seeding, so always the same.
        dtype: of the weights and activations.
        shape: of the input.
        gate: the fields that change for the check of the gradients, where fp64 needs a smaller model.
    """

    model: Callable[[], nn.Module]
    variants: tuple[Variant, ...]
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...]
    gate: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"shape": list(self.shape), "dtype": short(self.dtype)}


@dataclass(frozen=True, kw_only=True)
class TrainingCase(ModelCase):
    """Forward and backward for a random input (B, T, d) and a random gradient of the output.

    Attributes:
        forward: the output of the model for x (B, T, d).
        input_grad: whether x requires a gradient, as the output of a trained embedding does.
    """

    kind: ClassVar[str] = "training"

    forward: Callable[[nn.Module, Tensor], Tensor]
    input_grad: bool = True
    shape: tuple[int, int, int] = (2, 256, WIDTH)


@dataclass(frozen=True, kw_only=True)
class StepCase(ModelCase):
    """A full training step on random tokens (B, T): forward, the model's own loss, backward, AdamW."""

    kind: ClassVar[str] = "step"

    shape: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ForwardCase(ModelCase):
    """Forward without gradients on random tokens (B, T).

    Attributes:
        forward: what of the model's output is used; the rest is dropped.
    """

    kind: ClassVar[str] = "forward"

    forward: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, int] = (8, 2048)


_RECOMPUTE = (PLAIN, CHECKPOINT, SELECTIVE, NORMS, EXACT)
# What a user would pick, and what memsave has, from the fastest to the smallest.
_STEP = (PLAIN, CHECKPOINT, SELECTIVE, COMPILED, EXACT)
_MLP = (ALL, ALL_SAMPLED)  # for models whose MLP is a module: BERT's is written out in its layer
_NARROW = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256}
_ATTENTION = (PLAIN, CHECKPOINT, SELECTIVE, SHARED)
_TINY = {"shape": (2, 64, WIDTH)}
_TINY_LLAMA = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
_TINY_BERT = {**_TINY_LLAMA, "num_attention_heads": 4}

TRAINING_CASES: tuple[ModelCase, ...] = (
    TrainingCase(
        name="recompute_norm_llama_fp32",
        method="recompute_norm",
        title="Llama blocks (RMSNorm), fp32",
        model=models.llama,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_norm_llama_bf16",
        method="recompute_norm",
        title="Llama blocks (RMSNorm), bf16",
        model=models.llama,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        dtype=torch.bfloat16,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_norm_gpt2",
        method="recompute_norm",
        title="GPT-2 blocks (LayerNorm before the linears), fp32",
        model=models.gpt2,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_norm_bert",
        method="recompute_norm",
        title="BERT blocks (LayerNorm after the sum), fp32",
        model=models.bert,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_activation_mlp",
        method="recompute_activation",
        title="linears and GELUs without norms, fp32",
        expected_s=30.0,
        model=models.mlp,
        forward=direct,
        variants=(PLAIN, CHECKPOINT_BLOCKS, ACTIVATIONS),
    ),
    TrainingCase(
        name="recompute_activation_bert",
        method="recompute_activation",
        title="BERT blocks with gelu_new, a composite of eight operators, fp32",
        model=partial(models.bert, hidden_act="gelu_new"),
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, SELECTIVE, ACTIVATIONS, EXACT),
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_dropout_gpt2",
        method="recompute_dropout",
        title="GPT-2 blocks with dropout 0.1 outside of attention, fp32",
        model=models.gpt2_with_dropout,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_dropout_bert",
        method="recompute_dropout",
        title="BERT blocks with dropout 0.1 outside of attention, fp32",
        model=models.bert_with_dropout,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        tiny=_TINY,
    ),
    TrainingCase(
        name="recompute_mlp_llama",
        method="recompute_mlp",
        title="Llama blocks, what is kept of the MLPs from most to least, fp32",
        expected_s=15.0,
        model=models.llama,
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, SELECTIVE, MLPS, EXACT, ALL, ALL_SAMPLED),
        tiny=_TINY,
    ),
    TrainingCase(
        name="wta_crs_llama",
        method="wta_crs",
        title="every linear of Llama blocks sampled, fp32",
        expected_s=15.0,
        model=models.llama,
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, EXACT, SAMPLED_ALONE, *SAMPLED.values()),
        tiny=_TINY,
    ),
    TrainingCase(
        name="wta_crs_mlp",
        method="wta_crs",
        title="linears and GELUs without norms, fp32",
        model=models.mlp,
        forward=direct,
        variants=(PLAIN, CHECKPOINT_BLOCKS, SAMPLED_ALONE, SAMPLED_LESS),
    ),
    TrainingCase(
        name="wta_crs_lora",
        method="wta_crs",
        title="LoRA of rank 8 on a frozen Llama, every lora_A sampled, fp32",
        model=models.llama_with_lora,
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, EXACT, SAMPLED_LORA),
        tiny=_TINY,
    ),
    TrainingCase(
        name="share_mask_llama",
        method="share_mask",
        title="Llama blocks, one head of keys for two of queries, one sequence padded, fp32",
        expected_s=85.0,
        model=partial(models.llama, num_key_value_heads=2),
        forward=padded,
        variants=_ATTENTION,
        tiny=_TINY,
    ),
    TrainingCase(
        name="share_mask_bert",
        method="share_mask",
        title="BERT blocks with attention dropout 0.1, one sequence padded, fp32",
        model=partial(models.bert, attention_probs_dropout_prob=0.1),
        forward=padded,
        variants=_ATTENTION,
        tiny=_TINY,
    ),
    StepCase(
        name="step_demo",
        title="full training step of the demo's Llama (4 layers, 256 wide), fp32",
        devices=("cpu", "cuda"),
        model=models.demo,
        shape=(4, 256),
        variants=(*_STEP, *_MLP, SAMPLED_DOWN, SAMPLED_PROJECTIONS),
        expected_s=85.0,
        tiny={"model": partial(models.demo, num_hidden_layers=1), "shape": (2, 128)},
    ),
    StepCase(
        name="step_large_vocabulary",
        method="linear_cross_entropy",
        title="full training step of a Llama with 8,192 classes (2 layers, 256 wide), fp32",
        expected_s=45.0,
        model=models.large_vocabulary,
        shape=(2, 512),
        variants=(PLAIN, CHECKPOINT, LAZY_LOGITS, EXACT),
        gate={"model": partial(models.large_vocabulary, vocab_size=4096, num_hidden_layers=1), "shape": (2, 256)},
        tiny={"model": partial(models.large_vocabulary, vocab_size=4096, num_hidden_layers=1), "shape": (2, 256)},
    ),
    StepCase(
        name="step_llama_1b",
        title="full training step of a Llama-3.2-1B shape, bf16",
        devices=("cuda",),
        expected_s=180.0,
        model=models.llama_1b,
        dtype=torch.bfloat16,
        shape=(8, 2048),
        variants=(*_STEP, *_MLP, SAMPLED_DOWN, SAMPLED_PROJECTIONS, LIGER),
        gate={"model": partial(models.llama_1b, num_hidden_layers=2), "shape": (2, 512)},
        tiny={"model": partial(models.llama_1b, **_TINY_LLAMA), "shape": (2, 128), "gate": {}},
    ),
    StepCase(
        name="step_bert_large",
        title="full training step of a BERT-large shape, bf16",
        devices=("cuda",),
        expected_s=120.0,
        model=models.bert_large,
        dtype=torch.bfloat16,
        shape=(16, 512),
        variants=(*_STEP, SAMPLED_ENCODER),
        gate={"model": partial(models.bert_large, num_hidden_layers=2), "shape": (4, 512)},
        tiny={"model": partial(models.bert_large, **_TINY_BERT), "shape": (2, 128), "gate": {}},
    ),
    ForwardCase(
        name="forward_llama_blocks",
        title="forward without gradients of two Llama blocks, fp32",
        expected_s=120.0,
        model=models.llama_narrow_blocks,
        forward=models.hidden_of_tokens,
        variants=(PLAIN, EXACT),
        gate={"shape": (1, 512)},
        tiny={"model": partial(models.llama_narrow_blocks, **_NARROW), "shape": (2, 64), "gate": {}},
    ),
    ForwardCase(
        name="forward_llama_loss",
        title="loss without gradients of two Llama blocks and 8,192 classes, fp32",
        expected_s=150.0,
        model=models.llama_narrow,
        forward=models.loss_of_tokens,
        variants=(PLAIN, EXACT),
        gate={"shape": (1, 512)},
        tiny={"model": partial(models.llama_narrow, **_NARROW), "shape": (2, 64), "gate": {}},
    ),
)
