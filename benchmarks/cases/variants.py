"""The ways to train a model that the benchmark cases compare: memsave's, and what a user would pick instead."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import memsave
from memsave.explaining.changes import enable_checkpointing

KEEP_RATIO = 0.3


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train a case's model.

    Attributes:
        apply: changes the plain model in place.
        counts_kept: whether `memsave.saved_bytes` can see what this variant keeps for backward.
        compiled: whether torch.compile runs it. Under `memsave.measure`, which looks at operators, it would not.
        within: the settings of torch under which it runs.
        package: a package that it needs. A variant that names one is left out, with the reason, where the package is
            missing or its gradients fail the check; the others are measured all the same.
        patches: the modules that `apply` changes for the whole process; they are put back when the variant is done.
    """

    name: str
    apply: Callable[[nn.Module], object]
    counts_kept: bool = True
    compiled: bool = False
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    package: str | None = None
    patches: tuple[str, ...] = ()


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
    enable_checkpointing(model, context_fn=partial(create_selective_checkpoint_contexts, _products()))


def _compile(model: nn.Module) -> None:
    torch._dynamo.reset()
    model.compile()


def _half_of_the_activations() -> AbstractContextManager[object]:
    import torch._functorch.config as settings

    return settings.patch(activation_memory_budget=0.5)


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
    model: nn.Module, *, estimator: str = "pps", exact: bool = True, keep_ratio: float = KEEP_RATIO, target: str = r".*"
) -> None:
    if exact:
        memsave.convert_model(model)
    config = memsave.WTACRSConfig(keep_ratio=keep_ratio, estimator=estimator, target_modules=target)
    memsave.convert_model(model, config)


def _recompute_all(model: nn.Module, keep_ratio: float = 1.0) -> None:
    memsave.convert_model(model)
    config = memsave.RecomputeMLPConfig(recompute="all", keep_ratio=keep_ratio, target_modules=r".*")
    memsave.convert_model(model, config)


def _liger(model: nn.Module) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)


def _nothing(model: nn.Module) -> None:
    """The plain model."""


PLAIN = Variant(name="plain", apply=_nothing)
CHECKPOINT = Variant(name="activation checkpointing", apply=enable_checkpointing)
CHECKPOINT_BLOCKS = Variant(name="activation checkpointing", apply=_checkpoint_blocks)
# It keeps tensors in a cache of its own, where no saved-tensors hook sees them.
SELECTIVE = Variant(name="selective checkpointing", apply=_selective_checkpointing, counts_kept=False)
# "torch": where there is no compiler for it, the other variants are measured all the same.
COMPILED = Variant(
    name="torch.compile, activation budget 0.5",
    apply=_compile,
    counts_kept=False,
    compiled=True,
    within=_half_of_the_activations,
    package="torch",
)
EXACT = Variant(name="memsave exact", apply=memsave.convert_model)
NORMS = Variant(
    name="memsave recompute_norm", apply=partial(memsave.convert_model, configs=memsave.RecomputeNormConfig())
)
MLPS = Variant(name="memsave recompute_mlp", apply=partial(memsave.convert_model, configs=memsave.RecomputeMLPConfig()))
ACTIVATIONS = Variant(
    name="memsave recompute_activation",
    apply=partial(memsave.convert_model, configs=memsave.RecomputeActivationConfig()),
)
ALL = Variant(name="memsave all", apply=_recompute_all)
ALL_SAMPLED = Variant(name=f"memsave all + {KEEP_RATIO}", apply=partial(_recompute_all, keep_ratio=KEEP_RATIO))
SHARED = Variant(name="memsave share_mask", apply=partial(memsave.convert_model, configs=memsave.ShareMaskConfig()))
SAMPLED = {
    estimator: Variant(name=f"memsave exact + {estimator} {KEEP_RATIO}", apply=partial(_sample, estimator=estimator))
    for estimator in ("pps", "wta_crs", "crs")
}
SAMPLED_ALONE = Variant(name=f"memsave pps {KEEP_RATIO} alone", apply=partial(_sample, exact=False))
SAMPLED_LESS = Variant(name="memsave pps 0.1 alone", apply=partial(_sample, exact=False, keep_ratio=0.1))
SAMPLED_LORA = Variant(name=f"memsave exact + pps {KEEP_RATIO}", apply=partial(_sample, target=r".*lora_A.*"))
# The one linear of a Llama layer where sampling frees bytes, and all of them, where it saves time.
SAMPLED_DOWN = Variant(
    name=f"memsave exact + pps {KEEP_RATIO} of down_proj", apply=partial(_sample, target=r".*\.down_proj")
)
SAMPLED_PROJECTIONS = Variant(
    name=f"memsave exact + pps {KEEP_RATIO} of all projections", apply=partial(_sample, target=r".*_proj")
)
SAMPLED_ENCODER = Variant(
    name=f"memsave exact + pps {KEEP_RATIO} of the encoder",
    apply=partial(_sample, target=r".*\.encoder\..*\.(query|key|value|dense)"),
)
LAZY_LOGITS = Variant(
    name="memsave linear_cross_entropy alone",
    apply=partial(memsave.convert_model, configs=memsave.LinearCrossEntropyConfig()),
)
LIGER = Variant(
    name="Liger",
    apply=_liger,
    package="liger_kernel",
    patches=("transformers.models.llama.modeling_llama",),
)
