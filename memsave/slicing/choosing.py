"""From what is wished to the stretches: a budget, the fewest bytes that are cheap, or parts that the user chose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UnsupportedModelError
from .assembling import Stretch
from .lowering import Lowered
from .planner import Planner, Wish, node_after

TRIES = 6
LAST = 2


def choose_stretches(
    lowered: Lowered, settings: Mapping[str, Any], exact_bytes: Callable[[Sequence[Stretch]], int] | None = None
) -> tuple[list[Stretch], Planner]:
    """The stretches of a plan, and the planner that found them.

    Args:
        settings: `schedule`, and `budget_bytes`, `parts`, `split`; see `make_plan`.
        exact_bytes: tells the exact peak of stretches; without it, estimates must do.

    Raises:
        UnsupportedModelError: the budget cannot be met, or nothing can be sliced as wished.
    """
    split = None
    if settings.get("split") is not None:
        split = node_after(lowered, settings["split"])
        if split is None:
            raise UnsupportedModelError(f"split: no op belongs to a module {settings['split']!r}")
    wish = Wish(settings["schedule"], settings.get("budget_bytes"), settings.get("parts"), split)
    planner = Planner(lowered, wish)
    whole = [Stretch(0, len(lowered.nodes))]
    if wish.split is not None or wish.parts is not None:
        found = planner.as_wished()
        if found is None:
            where, reason = next(iter(planner.ends().items()), ("", "the graph has no maps with rows"))
            at = f"{where}: " if where else ""
            raise UnsupportedModelError(f"it cannot be computed part by part as wished: {at}{reason}")
        return found, planner
    if wish.budget_bytes is None:
        return _smallest(planner.least(cheap=True), whole, exact_bytes), planner
    return _within_budget(planner, wish.budget_bytes, whole, exact_bytes), planner


def _within_budget(
    planner: Planner,
    budget_bytes: int,
    whole: list[Stretch],
    exact_bytes: Callable[[Sequence[Stretch]], int] | None,
) -> list[Stretch]:
    if exact_bytes and exact_bytes(whole) <= budget_bytes:
        return whole
    allowed = float(budget_bytes)
    for _ in range(TRIES):  # estimates are a little off: ask for less until the exact bytes are within the budget
        path = planner.path(allowed)
        if path is None:
            break
        excess = exact_bytes(path[2]) - budget_bytes if exact_bytes else 0
        if excess <= 0:
            return path[2]
        allowed -= max(excess, allowed // 64)
    smallest = _smallest(planner.least(cheap=False), whole, exact_bytes)
    least_bytes = exact_bytes(smallest) if exact_bytes else 0
    if least_bytes > budget_bytes:
        raise UnsupportedModelError(
            f"budget_bytes: expected at least {least_bytes:,} for these shapes, the smallest plan's peak; "
            f"got {budget_bytes:,}"
        )
    return smallest


def _smallest(
    found: Sequence[list[Stretch]], whole: list[Stretch], exact_bytes: Callable[[Sequence[Stretch]], int] | None
) -> list[Stretch]:
    """The choice with the fewest exact bytes among the last few, which are smallest by estimate, and the whole."""
    if not exact_bytes:
        return found[-1] if found else whole
    return min([*found[: -1 - LAST : -1], whole], key=exact_bytes)
