"""What a converted attention module holds, and how a call goes through it: sparse, dense, or watched.

query (B, h, T, D), key (B, kv, S, D), value (B, kv, S, E). Buffers of the module: `codebook` (kv, M, C, d), without
heads as long as there is none, and for codebooks that follow the keys `codebook_counts` (kv, M, C).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..converted import Converted
from . import codebooks
from .codebooks import KeySample
from .function import attend
from .selecting import Choice, Visibility

BUFFERS = ("codebook", "codebook_counts")
_STATE = "_memsave_sparse"


class SparseState:
    """The settings of one module.

    Attributes:
        choice: how many keys, and how they are chosen.
        subspaces: M; None for one for each 8 features.
        codewords: C.
        dense_below: calls with fewer keys are dense.
        decay: of the averages that the codebook follows while training; None for one that stays.
        watch: where keys go in calibration, during which all calls are dense; None otherwise.
    """

    def __init__(
        self,
        choice: Choice,
        subspaces: int | None,
        codewords: int,
        dense_below: int,
        decay: float | None,
    ) -> None:
        self.choice = choice
        self.subspaces = subspaces
        self.codewords = codewords
        self.dense_below = dense_below
        self.decay = decay
        self.watch: KeySample | None = None

    def fitted(self, sample: Tensor) -> Tensor:
        """A codebook for keys like those of `sample` (kv, N, D)."""
        return codebooks.fit(sample, subspaces_of(sample.shape[2], self.subspaces), self.codewords)


def subspaces_of(head_size: int, subspaces: int | None) -> int:
    """M. Raises ValueError where heads of that size cannot be divided so."""
    wanted = max(1, head_size // 8) if subspaces is None else subspaces
    if head_size % wanted:
        raise ValueError(
            f"num_subspaces: heads of {head_size} features cannot be divided into {wanted} subspaces of equal size; "
            "give a number that divides the head size"
        )
    return wanted


def hold(module: nn.Module, state: SparseState, codebook: Tensor | None) -> None:
    """Give `module` what its calls need."""
    set_state(module, state)
    parameter = next(iter(module.parameters()), None)
    device = parameter.device if parameter is not None else torch.device("cpu")
    held = torch.empty(0, 1, state.codewords, 1) if codebook is None else codebook
    module.register_buffer("codebook", held.to(device))
    if state.decay is not None:
        counts = torch.zeros(held.shape[:3]) if codebook is None else _even(codebook)
        module.register_buffer("codebook_counts", counts.to(device))


def _even(codebook: Tensor) -> Tensor:
    return torch.full(codebook.shape[:3], 1 / codebook.shape[2])


def release(module: nn.Module) -> None:
    """Undo `hold`."""
    module.__dict__.pop(_STATE, None)
    for name in BUFFERS:
        module._buffers.pop(name, None)
        module._non_persistent_buffers_set.discard(name)
    _pending.pop(module, None)


class HoldsCodebook(Converted):
    """Mixin of the converted classes whose modules hold what `hold` gave."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Codebooks that follow the keys are empty until the first step: those of a later one load all the same."""
        state = state_of(self)  # type: ignore[arg-type]
        for name in BUFFERS if state is not None and state.decay is not None else ():
            own: Tensor = getattr(self, name)
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and own.dim() == given.dim() and (own.shape[0] == 0) != (given.shape[0] == 0):
                if own.shape[2] == given.shape[2]:
                    setattr(self, name, own.new_zeros(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]


def set_state(module: nn.Module, state: SparseState) -> None:
    """Let the calls of `module` go by `state`, without buffers."""
    module.__dict__[_STATE] = state


def state_of(module: nn.Module) -> SparseState | None:
    """What `hold` gave, or None."""
    return module.__dict__.get(_STATE)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    scale: float | None,
    dense: Callable[[], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """The attention of a converted module, (B, h, T, E); `dense` computes it without leaving any key out."""
    state = state_of(module)
    assert state is not None  # only converted modules call this
    if state.watch is not None:
        state.watch.add(key, _seen_keys(see, key))
        return dense()
    keys = key.shape[2]
    if state.decay is not None and module.training:
        _collect(module, key, see)
    codebook: Tensor = module.codebook  # type: ignore[assignment]
    all_kept = state.choice.num_keys(keys) >= keys
    if keys < state.dense_below or all_kept or not codebook.shape[0] or not query.shape[2]:
        return dense()
    if dropout >= 1:  # nothing is left of what any key would give
        return dense()
    return attend(query, key, value, codebook.float(), state.choice, see, scale, dropout)


def _seen_keys(see: Visibility, key: Tensor) -> Tensor | None:
    """(B, S): keys that any query may see by the mask; None for all."""
    if see.mask is None:
        return None
    return see.mask.any(2).any(1).expand(key.shape[0], key.shape[2])


# By module, the keys of the forwards since the last optimizer step. A side accumulator: what a forward computes must
# not depend on one that was run before it, or checkpointing, which runs forwards again, gives wrong gradients.
_pending: weakref.WeakKeyDictionary[nn.Module, KeySample] = weakref.WeakKeyDictionary()
_hook: Any = None


def _collect(module: nn.Module, key: Tensor, see: Visibility) -> None:
    global _hook
    in_backward = torch._C._current_graph_task_id() != -1  # a forward that checkpointing runs again
    if in_backward or is_fake(key) or torch.compiler.is_compiling() or not key.shape[2]:
        return
    if _hook is None:
        _hook = register_optimizer_step_post_hook(lambda *_: update_codebooks())
    sample = _pending.get(module)
    if sample is None:
        sample = _pending[module] = KeySample(codebooks.STEP_KEYS)
    sample.add(key.detach(), _seen_keys(see, key))


@torch.no_grad()
def update_codebooks() -> None:
    """Let the codebooks follow the keys since the last time. Every optimizer of torch calls it after its step.

    The buffers become new tensors: a backward that is still to come has kept the old ones.
    """
    for module, sample in list(_pending.items()):
        state, keys = state_of(module), sample.keys
        if state is None or state.decay is None or keys is None or not keys.shape[1]:
            continue
        old: Tensor = module.codebook  # type: ignore[assignment]
        if old.shape[0]:
            counts: Tensor = module.codebook_counts  # type: ignore[assignment]
            new, counts = codebooks.follow(old.float(), counts.float(), keys, state.decay)
        else:
            new = state.fitted(keys)
            counts = codebooks.first_counts(new, keys)
        module.codebook, module.codebook_counts = new, counts
    _pending.clear()
