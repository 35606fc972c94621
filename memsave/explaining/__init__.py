"""explain: what a training step keeps for backward, by module and by cause, and what would change it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MemsaveError, NoMatchError
from ..memory.estimating import MakeOptimizer, Step
from ..text import groups, pattern
from .causes import METHODS_OF, Cause, Keeper
from .changes import BARE, Change, changes_for
from .explanation import Explanation, Kept, Option, Trap
from .facts import Facts, run
from .traps import traps_in

__all__ = ["Explanation", "Kept", "Option", "Trap", "explain"]


def explain(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: str | MakeOptimizer | None = "adamw",
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Explanation:
    """Tell what one training step keeps for backward, why, and what would change it.

    The step runs on fake tensors as in `memsave.estimate`, once as the model is and once for each change that is
    predicted: nothing is allocated, and `model` stays as it is. Each storage that is kept when most is kept counts
    once, for the first module that keeps it.

    Args:
        model, batch, loss, autocast, device: as in `memsave.estimate`.
        optimizer: as there; by default AdamW, whose states are part of the peak. None leaves it out.

    Returns:
        Tables of the bytes by cause and by module, now and after `memsave.convert_model(model)`; kept bytes and peak
        with other changes, such as activation checkpointing; and the known traps that the model is in.

    Raises:
        What `memsave.estimate` raises.
    """
    step = Step(model, batch, loss, optimizer, autocast, device)
    facts = run(step)
    predicted = [_predict(step, change) for change in changes_for(facts)]
    bare = next((after for change, _, after in predicted if change is BARE), None)
    options = (_option("as it is", facts), *(option for _, option, _ in predicted if option is not None))
    return Explanation(
        model=type(model).__name__,
        causes=_by_cause(facts, bare),
        modules=_by_modules(facts, bare),
        options=options,
        traps=traps_in(facts, options),
        profile=facts.profile,
    )


def _predict(step: Step, change: Change) -> tuple[Change, Option | None, Facts | None]:
    """What the step needs after a change; no option for one that finds nothing to change."""
    try:
        after = run(step, change.apply)
    except NoMatchError:
        return change, None, None
    except MemsaveError as error:
        return change, Option(change=change.label, problem=str(error)), None
    return change, _option(change.label, after), after


def _option(label: str, facts: Facts) -> Option:
    profile = facts.profile
    return Option(change=label, kept_bytes=profile.saved_bytes, peak_bytes=profile.peak_bytes, phase=profile.phase)


def _by_cause(now: Facts, bare: Facts | None) -> tuple[Kept, ...]:
    rows = [_kept(cause, now.kept_for(cause), bare.kept_for(cause) if bare else None, bare) for cause in Cause]
    return _largest_first(rows)


def _by_modules(now: Facts, bare: Facts | None) -> tuple[Kept, ...]:
    keepers = dict.fromkeys([*now.kept, *(bare.kept if bare else ())])
    rows = []
    for cause, blocks in groups((keeper.cause, keeper.block) for keeper in keepers):
        mine = [Keeper(block, cause) for block in blocks]
        converted = sum(bare.kept.get(keeper, 0) for keeper in mine) if bare else None
        row = _kept(cause, sum(now.kept.get(keeper, 0) for keeper in mine), converted, bare)
        rows.append(replace(row, modules=pattern(blocks), count=len(blocks)))
    return _largest_first(rows)


def _kept(cause: Cause, kept_bytes: int, converted_bytes: int | None, bare: Facts | None) -> Kept:
    applied = bare.methods if bare else frozenset()
    freed = converted_bytes is not None and converted_bytes < kept_bytes
    methods = tuple(name for name in METHODS_OF.get(cause, ()) if freed and name in applied)
    return Kept(cause=str(cause), kept_bytes=kept_bytes, converted_bytes=converted_bytes, methods=methods)


def _largest_first(rows: list[Kept]) -> tuple[Kept, ...]:
    held = [row for row in rows if row.kept_bytes or row.converted_bytes]
    return tuple(sorted(held, key=lambda row: -row.kept_bytes))
