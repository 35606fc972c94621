"""The changes of a model whose effect `explain` predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config import applied_configs
from ..convert import convert_model
from ..methods import RecomputeMLPConfig
from .causes import Cause, is_adapted
from .facts import Facts


@dataclass(frozen=True)
class Change:
    """A change of a model in place.

    Attributes:
        label: the code or the words that a user would need.
        apply: makes the change.
    """

    label: str
    apply: Callable[[nn.Module], object]


BARE = Change("memsave.convert_model(model)", convert_model)


def _convert_all(model: nn.Module) -> None:
    convert_model(model)
    convert_model(model, RecomputeMLPConfig(recompute="all"))


def _convert_checkpointed(model: nn.Module) -> None:
    convert_model(model)
    enable_checkpointing(model)


def enable_checkpointing(model: Any, **settings: object) -> None:
    """Switch on activation checkpointing of a transformers model; ValueError if it has none.

    Args:
        settings: of `torch.utils.checkpoint.checkpoint`.
    """
    # transformers 5 renamed the method; the old name goes away in version 6.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    enable({"use_reentrant": False, **settings})


def _narrow_adapters(model: nn.Module) -> None:
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if is_adapted(module) and isinstance(weight, Tensor) and weight.is_floating_point():
            for inner in (m for child in module.children() if child is not base for m in child.modules()):
                for name, p in inner._parameters.items():
                    if p is not None:  # not by .to(), which cannot change fake parameters
                        narrow = nn.Parameter(p.detach().to(weight.dtype), requires_grad=p.requires_grad)
                        inner._parameters[name] = narrow


def _convert_narrow(model: nn.Module) -> None:
    _narrow_adapters(model)
    convert_model(model)


CHECKPOINTING = Change("activation checkpointing", enable_checkpointing)
NARROW_ADAPTERS = Change("adapters in the dtype of the base", _narrow_adapters)


def can_checkpoint(model: nn.Module) -> bool:
    """Whether transformers can checkpoint the layers of `model`."""
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def changes_for(facts: Facts) -> Iterator[Change]:
    """The changes that are worth predicting for what a run told."""
    model = facts.model
    checkpoints = can_checkpoint(model) and not facts.checkpointing
    yield BARE
    mlp_configs = [applied_configs(module).get("recompute_mlp") for module in model.modules()]
    if not any(isinstance(c, RecomputeMLPConfig) and c.recompute == "all" for c in mlp_configs):
        yield Change('... then RecomputeMLPConfig(recompute="all")', _convert_all)
    if checkpoints:
        yield CHECKPOINTING
        yield Change(f"{CHECKPOINTING.label}, and {BARE.label}", _convert_checkpointed)
    if facts.kept_for(Cause.ADAPTER_CASTS):
        yield NARROW_ADAPTERS
        yield Change(f"{NARROW_ADAPTERS.label}, and {BARE.label}", _convert_narrow)
