"""Why a tensor is kept for backward, told from the modules that made it and that keep it.

The kinds of modules are told by class where torch has one, else by the words that class names have in common.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from ..memory.noting import Save
from ..nn.activation_kind import activation_of
from ..nn.linear import is_linear
from ..nn.mlp_graph import looks_like_mlp, out_features, reads_like_linear


class Cause(str, Enum):
    """What bytes are kept for."""

    NORMS = "norms: inputs and copies"
    NORM_OUTPUTS = "norm outputs, which linears read"
    ATTENTION = "attention"
    MASKS = "attention masks"
    MLP = "feed-forward blocks"
    DROPOUT = "dropout"
    LOGITS = "logits and loss"
    ADAPTER_CASTS = "casts to the adapters' dtype"
    ADAPTERS = "adapters"
    WEIGHT_CASTS = "casts of weights by autocast"
    CHECKPOINTS = "inputs of checkpointed modules"
    CONVOLUTIONS = "convolutions"
    EMBEDDINGS = "embeddings"
    LINEARS = "other linears and activations"
    OTHER = "other operators"

    def __str__(self) -> str:
        return self.value


# Methods that free bytes of a cause, as the report names them.
METHODS_OF = {
    Cause.NORMS: ("recompute_norm",),
    Cause.NORM_OUTPUTS: ("recompute_norm", "recompute_dropout"),
    Cause.ATTENTION: ("share_mask", "recompute_dropout", "recompute_norm"),
    Cause.MASKS: ("share_mask",),
    Cause.MLP: ("recompute_activation", "recompute_mlp", "recompute_dropout"),
    Cause.DROPOUT: ("recompute_dropout",),
    Cause.LOGITS: ("linear_cross_entropy",),
    Cause.LINEARS: ("recompute_activation", "recompute_norm", "recompute_dropout"),
}

_ATTENTION_WORDS = ("attention", "attn")
_MLP_WORDS = ("mlp", "feedforward", "ffn", "dense_act", "denserelu", "densegated", "expert", "moe", "intermediate")
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def kind(module: nn.Module) -> Cause | None:
    """What a module is, as the cause of what it keeps; None for one that only holds others."""
    name = type(module).__name__.lower()
    if is_adapted(module):
        return Cause.ADAPTERS
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Cause.DROPOUT
    if isinstance(module, nn.Embedding):
        return Cause.EMBEDDINGS
    if isinstance(module, _CONVOLUTIONS):
        return Cause.CONVOLUTIONS
    if "norm" in name and not any(is_linear(child) for child in module.children()):
        return Cause.NORMS
    if isinstance(module, nn.MultiheadAttention) or any(word in name for word in _ATTENTION_WORDS):
        return Cause.ATTENTION
    if any(word in name for word in _MLP_WORDS) or looks_like_mlp(module):
        return Cause.MLP
    return None


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer with adapters of PEFT's kind around its base layer."""
    return any(cls.__name__ == "BaseTunerLayer" for cls in type(module).__mro__)


def head_of(model: nn.Module) -> nn.Module | None:
    """The linear that makes the logits, where a model tells which that is."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return head if head is not None and reads_like_linear(head) else None


@dataclass(frozen=True)
class Keeper:
    """Who keeps a tensor: the smallest block around the module that runs, and why."""

    block: str
    cause: Cause


class Causes:
    """Tells the causes of what one run keeps.

    Args:
        model: the model that ran, by whose module names the tracker went.
        recomputed: the modules that activation checkpointing ran again.
    """

    def __init__(self, model: nn.Module, recomputed: Collection[str]) -> None:
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._root = type(model).__name__  # what the tracker calls the model itself
        self._kinds: dict[str, Cause | None] = {}
        # The inputs are kept before the module runs, or by hooks of its own.
        outer = {"", *recomputed, *(around for name in recomputed for around in outwards(name))}
        self._checkpointing = outer if recomputed else set()
        head = head_of(model)
        self._classes = None if head is None else out_features(head)
        # The loss runs in the model that has the head, or outside of it.
        name = next((name for name, module in self._modules.items() if module is head), "")
        self._with_loss = {"", *outwards(name)} if head is not None else set()

    def keeper(self, save: Save) -> Keeper:
        """Why the tensor of `save` is kept, and the block that keeps it."""
        name = self._own_name(save.module)
        cause = self._cause(save, name)
        around = self._adapted(name) or name
        block = name if cause is Cause.CHECKPOINTS else self._nearest(around, besides=Cause.ADAPTERS) or around
        return Keeper(block or self._root, cause)

    def is_logits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has a number for each class of the vocabulary."""
        return len(shape) > 1 and shape[-1] == self._classes

    def _own_name(self, tracked: str) -> str:
        """The name of a module as the model has it; "" for the model itself and for what runs outside of it."""
        return tracked if tracked in self._modules else ""

    def _cause(self, save: Save, name: str) -> Cause:
        module, maker = self._modules[name], self._own_name(save.record.module)
        if self.is_logits(save.shape):
            return Cause.LOGITS
        if is_linear(module) and maker == name and _is_like_weight(save, module):
            return Cause.WEIGHT_CASTS
        if name in self._checkpointing:
            return Cause.CHECKPOINTS
        if self._is_adapter_cast(save, name):
            return Cause.ADAPTER_CASTS
        if is_linear(module) and self._kind(maker) is Cause.NORMS:
            return Cause.NORM_OUTPUTS
        return self._cause_of_place(save, name, maker)

    def _cause_of_place(self, save: Save, name: str, maker: str) -> Cause:
        found = self._nearest(name)
        cause = self._kind(found)
        if cause is Cause.ATTENTION and len(save.shape) == 4 and found not in outwards(maker) and found != maker:
            return Cause.MASKS
        if cause is not None:
            return cause
        module = self._modules[name]
        if is_linear(module) or activation_of(module) is not None:
            return Cause.MLP if self._kind(self._nearest(maker)) is Cause.MLP else Cause.LINEARS
        return Cause.LOGITS if name in self._with_loss else Cause.OTHER

    def _adapted(self, name: str) -> str:
        """The layer with adapters that `name` is, or is within; "" for none."""
        return next((outer for outer in (name, *outwards(name)) if self._kind(outer) is Cause.ADAPTERS), "")

    def _is_adapter_cast(self, save: Save, name: str) -> bool:
        weight = getattr(getattr(self._modules[self._adapted(name)], "base_layer", None), "weight", None)
        if not isinstance(weight, Tensor) or not (weight.is_floating_point() and save.dtype.is_floating_point):
            return False
        return save.dtype.itemsize > weight.dtype.itemsize

    def _nearest(self, name: str, besides: Cause | None = None) -> str:
        """The innermost module, from `name` outwards, that is of some kind; "" for none."""
        return next((n for n in (name, *outwards(name)) if n and self._kind(n) not in (None, besides)), "")

    def _kind(self, name: str) -> Cause | None:
        if name not in self._kinds:
            self._kinds[name] = kind(self._modules[name]) if name else None
        return self._kinds[name]


def outwards(name: str) -> Iterator[str]:
    """The names of the modules around the module `name`, innermost first, without the model itself."""
    while name := name.rpartition(".")[0]:
        yield name


def _is_like_weight(save: Save, linear: nn.Module) -> bool:
    """Whether the tensor of `save` may be the weight of `linear` in another dtype."""
    weight = linear.weight
    return (
        isinstance(weight, Tensor) and save.dtype != weight.dtype and save.shape in (weight.shape, weight.shape[::-1])
    )
