"""The benchmark cases of the methods, as data: a model, and the ways to train it that are compared.

B sequences of T tokens, d features: models read x (B, T, d). The first variant is always the plain model, the others
are memsave's and what a user would pick instead. A new method adds its cases to CASES.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import memsave

BATCH, LENGTH, WIDTH, LAYERS, HEADS = 2, 256, 256, 2, 4
KEEP_RATIO = 0.3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train a case's model.

    Attributes:
        apply: changes the plain model in place.
        counts_kept: whether `memsave.saved_bytes` can see what this variant keeps for backward.
    """

    name: str
    apply: Callable[[nn.Module], object]
    counts_kept: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingCase:
    """Forward and backward of one model, side by side in several variants.

    Attributes:
        model: makes the plain model in fp32; called after seeding, so always the same.
        forward: the output of the model for x (B, T, d).
        input_grad: whether x requires a gradient, as the output of a trained embedding does.
    """

    name: str
    method: str
    title: str
    model: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor], Tensor]
    variants: tuple[Variant, ...]
    dtype: torch.dtype = torch.float32
    input_grad: bool = True
    shape: tuple[int, int, int] = (BATCH, LENGTH, WIDTH)


@dataclass(frozen=True, kw_only=True)
class VarianceCase:
    """The variance of the sampled weight gradient, relative to its squared norm, by estimator.

    x (N, D) has row norms exp(sigma * z) for normal z, dy (N, O) = x A / |x A| + noise has rows of equal norm.
    """

    name: str
    method: str
    title: str
    keep_ratios: tuple[float, ...]
    sigmas: tuple[float, ...]
    rows: int = 512
    features: int = 64
    outputs: int = 64
    draws: int = 400


def transformer(config_class: str, model_class: str, settings: Mapping[str, object]) -> nn.Module:
    """A transformers model without a head, with random weights."""
    import transformers

    config = getattr(transformers, config_class)(vocab_size=64, **settings)
    return getattr(transformers, model_class)(config)


_LLAMA = {"hidden_size": WIDTH, "intermediate_size": 688, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_BERT = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
llama = partial(transformer, "LlamaConfig", "LlamaModel", {**_LLAMA, "use_cache": False})
# Without dropout: its noise is the same in every variant, but hides what the norms keep.
bert = partial(
    transformer,
    "BertConfig",
    "BertModel",
    {**_BERT, "num_attention_heads": HEADS, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
)
gpt2 = partial(
    transformer,
    "GPT2Config",
    "GPT2Model",
    {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    | {"use_cache": False},
)


def mlp() -> nn.Module:
    """Linears and GELUs without norms: (B, T, d) -> (B, T, d)."""
    layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def llama_with_lora() -> nn.Module:
    """LoRA of rank 8 on every linear of a frozen Llama; B is random so that A has a gradient."""
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


def from_embeddings(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def direct(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _enable_checkpointing(model: nn.Module, **settings: object) -> None:
    # transformers 5 renamed the method; the old name goes away in version 6.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False, **settings})


def _products() -> list[object]:
    """The operators whose outputs selective checkpointing keeps: everything but elementwise work and norms."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    ]


def _selective_checkpointing(model: nn.Module) -> None:
    _enable_checkpointing(model, context_fn=partial(create_selective_checkpoint_contexts, _products()))


class _CheckpointedBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)


def _checkpoint_blocks(model: nn.Module) -> None:
    for name, block in list(model.named_children()):
        setattr(model, name, _CheckpointedBlock(block))


def _sample(
    model: nn.Module, *, estimator: str = "pps", exact: bool = True, keep_ratio: float = KEEP_RATIO, target: str = ""
) -> None:
    if exact:
        memsave.convert_model(model)
    config = memsave.WTACRSConfig(keep_ratio=keep_ratio, estimator=estimator, target_modules=target or r".*")
    memsave.convert_model(model, config)


def _nothing(model: nn.Module) -> None:
    """The plain model."""


PLAIN = Variant(name="plain", apply=_nothing)
CHECKPOINT = Variant(name="activation checkpointing", apply=_enable_checkpointing)
# It keeps tensors in a cache of its own, where no saved-tensors hook sees them.
SELECTIVE = Variant(name="selective checkpointing", apply=_selective_checkpointing, counts_kept=False)
EXACT = Variant(name="memsave exact", apply=memsave.convert_model)
SAMPLED = {
    estimator: Variant(name=f"memsave exact + {estimator} {KEEP_RATIO}", apply=partial(_sample, estimator=estimator))
    for estimator in ("pps", "wta_crs", "crs")
}
SAMPLED_ALONE = Variant(name=f"memsave pps {KEEP_RATIO} alone", apply=partial(_sample, exact=False))
SAMPLED_LESS = Variant(name="memsave pps 0.1 alone", apply=partial(_sample, exact=False, keep_ratio=0.1))
SAMPLED_LORA = Variant(name=f"memsave exact + pps {KEEP_RATIO}", apply=partial(_sample, target=r".*lora_A.*"))

_RECOMPUTE = (PLAIN, CHECKPOINT, SELECTIVE, EXACT)

CASES: tuple[TrainingCase | VarianceCase, ...] = (
    TrainingCase(
        name="recompute_norm_llama_fp32",
        method="recompute_norm",
        title="Llama blocks (RMSNorm), fp32",
        model=llama,
        forward=from_embeddings,
        variants=_RECOMPUTE,
    ),
    TrainingCase(
        name="recompute_norm_llama_bf16",
        method="recompute_norm",
        title="Llama blocks (RMSNorm), bf16",
        model=llama,
        forward=from_embeddings,
        variants=_RECOMPUTE,
        dtype=torch.bfloat16,
    ),
    TrainingCase(
        name="recompute_norm_gpt2",
        method="recompute_norm",
        title="GPT-2 blocks (LayerNorm before the linears), fp32",
        model=gpt2,
        forward=from_embeddings,
        variants=_RECOMPUTE,
    ),
    TrainingCase(
        name="recompute_norm_bert",
        method="recompute_norm",
        title="BERT blocks (LayerNorm after the sum), fp32",
        model=bert,
        forward=from_embeddings,
        variants=_RECOMPUTE,
    ),
    TrainingCase(
        name="wta_crs_llama",
        method="wta_crs",
        title="every linear of Llama blocks sampled, fp32",
        model=llama,
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, EXACT, SAMPLED_ALONE, *SAMPLED.values()),
    ),
    TrainingCase(
        name="wta_crs_mlp",
        method="wta_crs",
        title="linears and GELUs without norms, fp32",
        model=mlp,
        forward=direct,
        variants=(
            PLAIN,
            Variant(name=CHECKPOINT.name, apply=_checkpoint_blocks),
            SAMPLED_ALONE,
            SAMPLED_LESS,
        ),
    ),
    TrainingCase(
        name="wta_crs_lora",
        method="wta_crs",
        title="LoRA of rank 8 on a frozen Llama, every lora_A sampled, fp32",
        model=llama_with_lora,
        forward=from_embeddings,
        variants=(PLAIN, CHECKPOINT, EXACT, SAMPLED_LORA),
    ),
    VarianceCase(
        name="wta_crs_variance",
        method="wta_crs",
        title="variance of the estimators",
        keep_ratios=(0.1, 0.3, 0.5),
        sigmas=(0.0, 0.5, 1.0),
    ),
)
