"""Known reasons for memory that is used in vain, each with what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from ..memory.profile import format_bytes
from .causes import Cause, is_adapted
from .changes import BARE, CHECKPOINTING, NARROW_ADAPTERS, can_checkpoint
from .explanation import Option, Trap
from .facts import Facts

# From these shares of the peak, or of what is kept, on: below them, the advice would change little.
_LOGITS, _CHECKPOINTING, _OPTIMIZER, _SCORES, _CASTS = 0.15, 0.3, 0.4, 0.1, 0.02


def traps_in(facts: Facts, options: Sequence[Option]) -> tuple[Trap, ...]:
    """The traps that a model is in, largest first.

    Args:
        facts: of the model as it is.
        options: predicted changes, with which the advice is underlined.
    """
    predicted = {option.change: option for option in options}
    found = [trap for look in _TRAPS for trap in look(facts, predicted)]
    return tuple(sorted(found, key=lambda trap: -trap.affected_bytes))


def _logits(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size, peak = facts.logits_bytes, facts.profile.peak_bytes
    if size > _LOGITS * peak:
        yield Trap(
            name="logits dominate",
            text=f"{format_bytes(size)} of the peak ({size / peak:.0%}) are logits, their gradients and copies: a "
            "number for each token and class. memsave.convert_model(model) (linear_cross_entropy) makes the loss "
            "without them, if the model is given labels; in a loop of your own, "
            "memsave.linear_cross_entropy(hidden, weight, target)." + _then(predicted.get(BARE.label), facts),
            affected_bytes=size,
        )


def _adapter_casts(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size = facts.kept_for(Cause.ADAPTER_CASTS)
    if size > _CASTS * facts.profile.saved_bytes:
        yield Trap(
            name="adapters wider than the base",
            text=f"each adapter keeps a cast of its input, {format_bytes(size)} together, because PEFT makes adapters "
            "float32. get_peft_model(model, config, autocast_adapter_dtype=False) makes them in the dtype of the base."
            + _then(predicted.get(NARROW_ADAPTERS.label), facts),
            affected_bytes=size,
        )


def _base_trains(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    adapted = [module for module in facts.model.modules() if is_adapted(module)]
    bases = [getattr(module, "base_layer", None) for module in adapted]
    trained = {id(p): p for base in bases if isinstance(base, nn.Module) for p in base.parameters() if p.requires_grad}
    if size := sum(p.nbytes for p in trained.values()):
        yield Trap(
            name="the base of the adapters is trained",
            text=f"{format_bytes(size)} of weights under adapters need gradients, so they have gradients and optimizer "
            "states besides the adapters'. Freeze them (requires_grad_(False)), as get_peft_model does.",
            affected_bytes=size,
        )


def _no_checkpointing(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size, option = facts.profile.saved_bytes, predicted.get(CHECKPOINTING.label)
    if option is not None and option.kept_bytes is not None and size > _CHECKPOINTING * facts.profile.peak_bytes:
        yield Trap(
            name="activation checkpointing is off",
            text=f"{format_bytes(size)} are kept for backward. model.activation_checkpointing_enable() keeps the "
            "inputs of the layers and computes the rest again: one more forward." + _then(option, facts),
            affected_bytes=size - option.kept_bytes,
        )


def _idle_checkpointing(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    if facts.checkpointing and can_checkpoint(facts.model) and not facts.profile.recomputed_modules:
        yield Trap(
            name="activation checkpointing does nothing",
            text="it is switched on, but no module ran again in backward, and "
            f"{format_bytes(facts.profile.saved_bytes)} are kept. A layer whose forward was replaced by an attribute "
            "of the object is never checkpointed.",
            affected_bytes=facts.profile.saved_bytes,
        )


def _optimizer(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size, peak = facts.profile.by_category["optimizer"], facts.profile.peak_bytes
    if not facts.steps or (facts.profile.phase != "optimizer" and size <= _OPTIMIZER * peak):
        return
    where = ", and the peak is in its step, which no method for activations lowers" * (
        facts.profile.phase == "optimizer"
    )
    yield Trap(
        name="the optimizer makes the peak" if where else "optimizer states dominate",
        text=f"its states are {format_bytes(size)} of the peak ({size / peak:.0%}){where}. Adapters "
        "(memsave.SHiRAConfig, memsave.LaMDAConfig, LoRA) need states for few parameters; optimizers with small "
        "states (Adafactor, 8-bit Adam, SGD) and foreach=False for fewer temporaries help as well.",
        affected_bytes=size,
    )


def _scores(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size = facts.scores_bytes
    if size > _SCORES * facts.profile.saved_bytes:
        yield Trap(
            name="attention keeps a number for each pair of tokens",
            text=f"{format_bytes(size)} grow with the square of the length. "
            'attn_implementation="sdpa" (or "flash_attention_2") keeps none of them; with attention dropout on the CPU '
            "it does, and memsave's share_mask packs its masks into bits.",
            affected_bytes=size,
        )


def _weight_casts(facts: Facts, predicted: dict[str, Option]) -> Iterator[Trap]:
    size = facts.kept_for(Cause.WEIGHT_CASTS)
    if size > _SCORES * facts.profile.saved_bytes:
        yield Trap(
            name="autocast keeps copies of the weights",
            text=f"{format_bytes(size)}: under autocast, each linear keeps its weight in the narrow dtype, too. "
            "Weights that are bfloat16 themselves need no copy (then the optimizer should keep float32 masters or "
            "round stochastically).",
            affected_bytes=size,
        )


_Look = Callable[[Facts, dict[str, Option]], Iterator[Trap]]
_TRAPS: tuple[_Look, ...] = (
    _logits,
    _adapter_casts,
    _base_trains,
    _no_checkpointing,
    _idle_checkpointing,
    _optimizer,
    _scores,
    _weight_casts,
)


def _then(option: Option | None, facts: Facts) -> str:
    """What the prediction says of the advice."""
    if option is None or option.peak_bytes is None:
        return ""
    return f" Predicted peak: {format_bytes(option.peak_bytes)} instead of {format_bytes(facts.profile.peak_bytes)}."
