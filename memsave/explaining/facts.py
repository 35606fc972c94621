"""What one run of a training step tells: the profile, the bytes by cause, and what is live at the peak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..config import applied_configs
from ..memory import MemoryProfile
from ..memory.estimating import Step
from ..memory.noting import NotingTracker, Save
from ..memory.replay import build_profile
from ..memory.storages import Record
from .causes import Cause, Causes, Keeper


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One run.

    Attributes:
        model: the copy that ran; its tensors are fake.
        profile: as `memsave.estimate` gives it.
        kept: bytes kept for backward when most is kept, by who keeps them and why; adds up to `profile.saved_bytes`.
        logits_bytes: live at the peak, with a number for each class of the vocabulary.
        scores_bytes: kept for backward by attention, with a number for each pair of tokens.
        steps: whether an optimizer steps.
    """

    model: nn.Module
    profile: MemoryProfile
    kept: dict[Keeper, int]
    logits_bytes: int
    scores_bytes: int
    steps: bool

    def kept_for(self, cause: Cause) -> int:
        """Bytes kept for backward for one cause."""
        return sum(size for keeper, size in self.kept.items() if keeper.cause is cause)

    @cached_property
    def methods(self) -> frozenset[str]:
        """The methods that the model is converted by."""
        return frozenset(name for module in self.model.modules() for name in applied_configs(module))

    @property
    def checkpointing(self) -> bool:
        """Whether activation checkpointing of transformers is switched on."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())


def run(step: Step, change: Callable[[nn.Module], object] | None = None) -> Facts:
    """Run the step on a copy of its model after `change`, and tell what it keeps."""
    tracker = NotingTracker()
    model = step.run(tracker, change)
    causes = Causes(model, tracker.recomputed)
    first: dict[Record, Save] = {}
    for save in tracker.saves:
        first.setdefault(save.record, save)
    kept: Counter[Keeper] = Counter()
    scores_bytes = 0
    for record, size in tracker.kept_at_most().items():
        save = first[record]
        keeper = causes.keeper(save)
        kept[keeper] += size
        is_scores = len(save.shape) == 4 and save.shape[-2] > 1 and save.shape[-1] == save.shape[-2]
        scores_bytes += size * (is_scores and keeper.cause in (Cause.ATTENTION, Cause.DROPOUT))
    # What an op uses inside has no shape.
    live = [(tracker.origins[r], r, size) for r, size in tracker.live_at_peak().items() if r in tracker.origins]
    return Facts(
        model=model,
        profile=build_profile(tracker.existing, tracker.events, None, tracker.recomputed),
        kept=dict(kept),
        logits_bytes=sum(size for origin, r, size in live if not r.role and causes.is_logits(origin.shape)),
        scores_bytes=scores_bytes,
        steps=step.make_optimizer is not None,
    )
