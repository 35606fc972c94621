"""From a plan to a converted model: methods look at all their targets together, then all changes are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .applying import Application, Change
from .config import MethodConfig, Survey
from .errors import NoMatchError
from .planning import Plan
from .targets import Named

_UNCHANGED = "The model was not changed."
Surveys = Mapping[MethodConfig, Survey]


def survey_targets(
    model: nn.Module, plan: Plan, modules: Sequence[Named], calibration: Iterable[Any] | None
) -> dict[MethodConfig, Survey]:
    """The surveys of the methods that make one. What they refuse leaves the plan, and what is around targets joins it.

    Raises:
        NoMatchError: a method refuses all its targets.
    """
    surveys: dict[MethodConfig, Survey] = {}
    ids = {name: id(m.module) for m in modules for name in m.names}
    for config in dict.fromkeys(change.config for change in plan.changes):
        targets = [(change.name, change.module) for change in plan.changes if change.config == config]
        survey = config.survey(model, targets, calibration)
        if survey is None:
            continue
        again = any(change.config == config for change in plan.already)  # what it refuses now, it refused then
        if not again and all(name in survey.refused for name, _ in targets):
            name, reason = next(iter(survey.refused.items()))
            raise NoMatchError(f"{config}: {name}: {reason}; so it is for all its targets. {_UNCHANGED}")
        surveys[config] = survey
        plan.changes = [c for c in plan.changes if c.config != config or c.name not in survey.refused]
        plan.changes += [Change(name, module, config) for name, module in survey.around]
        plan.reasons |= {ids[name]: reason for name, reason in (survey.refused | survey.reasons).items()}  # type: ignore[operator]
    return surveys


def carry_out(model: nn.Module, changes: Sequence[Change], surveys: Surveys, calibration: Iterable[Any] | None) -> None:
    """Apply the changes, each config's together; on any exception the model is as it was."""
    with Application(model) as application:
        for config in dict.fromkeys(change.config for change in changes):
            mine = {change.name: change for change in changes if change.config == config}

            def convert(name: str, how: Callable[[nn.Module], nn.Module], mine: Mapping[str, Change] = mine) -> None:
                application.convert(mine[name], how)

            targets = [(change.name, change.module) for change in mine.values()]
            config.carry_out(model, targets, surveys.get(config), calibration, convert)
        application.finish()


def rebuild_like(model: nn.Module, changes: Sequence[Change], surveys: Surveys) -> None:
    """Give a copy of the model, whose tensors may have no values, the structure that the changes would give it."""
    with Application(model) as application:
        for name, _, config in changes:
            survey = surveys.get(config)

            def how(module: nn.Module, name: str = name, config: Any = config, survey: Any = survey) -> nn.Module:
                return config.convert(module) if survey is None else config.rebuild(module, survey.states[name])

            application.convert(Change(name, model.get_submodule(name), config), how)
        application.finish()
