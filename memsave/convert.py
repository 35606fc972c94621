"""convert_model and restore_model: plan everything, then apply it all or nothing. No method is known here by name.

The plan is made without touching the model, and every problem found is raised together. Applying keeps a log, and on
any exception the model is put back as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from .applying import Change, unapply_changes
from .carrying_out import Surveys, carry_out, rebuild_like, survey_targets
from .config import Guarantee, MethodConfig, TargetedConfig, applied_configs
from .errors import (
    MemsaveError,
    NotAModelError,
    RestoreError,
    UnsupportedModelError,
    raise_all,
)
from .optimizers import watching_parameters
from .planning import Plan, kind_of, plan_changes, problems_of_defaults, skipped
from .report import NOT_A_MODEL, Estimate, Report, group_rows
from .targets import names_by_module
from .wrappers import wrapping

_UNCHANGED = "The model was not changed."


def convert_model(
    model: nn.Module,
    configs: MethodConfig | Sequence[MethodConfig] | None = None,
    *,
    batch: Any = None,
    calibration: Iterable[Any] | None = None,
    dry_run: bool = False,
) -> Report:
    """Convert `model` in place and return a report; the result is not the model.

    Args:
        model: any module that is not wrapped (DDP, FSDP, compiled) yet. Parameters stay the same objects unless a
            method says otherwise, so an optimizer made before goes on working.
        configs: one config or several; None applies every method whose guarantee is exact and whose `default` is set.
        batch: what the model is called with, as `memsave.estimate` takes it. The report then has the bytes that
            forward and backward need before and after, predicted by fake tensors.
        calibration: batches of data for the methods that look at them, such as `FlashSVDConfig(whiten="activation")`:
            a list or another iterable that can be run through several times. A mapping is passed to the model as
            keyword arguments, a tuple or list as arguments, anything else as the only argument.
        dry_run: plan and report without changing anything.

    Raises:
        EstimateError: the step on `batch` cannot be predicted; see `memsave.estimate`.
        NoMatchError: a target matches nothing, or nothing that its method converts.
        ConflictError: two configs set the same part of one module differently, also across calls.
        UnsupportedModelError: the model is wrapped, or cannot be converted for a reason that is named.
        ConversionError: several of these at once, all listed. In every case the model is unchanged.
    """
    wanted = _as_configs(model, configs)
    modules = names_by_module(model)
    plan = plan_changes(model, wanted, modules, defaults=configs is None)
    raise_all(plan.problems if configs is not None else problems_of_defaults(plan, wanted, modules))
    _check_calibration(plan, calibration)
    surveys = survey_targets(model, plan, modules, calibration)
    kinds = {id(m.module): kind_of(m.module) for m in modules}
    report = Report(
        action="would be converted (dry run)" if dry_run else "converted",
        rows=group_rows(_converted(plan.changes, surveys), kinds),
        already=group_rows(_converted(plan.already, {}), kinds),
        skipped=skipped(modules, plan, wanted),
        devices=tuple(sorted({str(p.device) for p in model.parameters()})),
        notes=tuple(note for survey in surveys.values() for note in survey.notes),
        estimate=None if batch is None else _estimate(model, plan, surveys, batch),
    )
    if not dry_run:
        with watching_parameters(model):
            carry_out(model, plan.changes, surveys, calibration)
    return report


def _check_calibration(plan: Plan, calibration: Iterable[Any] | None) -> None:
    asking = list(dict.fromkeys(str(change.config) for change in plan.changes if change.config.calibrated))
    if asking and calibration is None:
        raise ValueError(
            f"convert_model: calibration: {asking[0]} needs batches of data, got None; pass a list of what the model "
            f"is called with. {_UNCHANGED}"
        )
    looked = any(change.config.calibrated for change in plan.already)  # a call that is repeated does nothing
    if calibration is not None and not (asking or looked):
        raise ValueError(f"convert_model: calibration was given, but no config of this call looks at it. {_UNCHANGED}")


def _converted(changes: Sequence[Change], surveys: Surveys) -> list[Change]:
    """The changes as the report names them: what a method of model scope converts, instead of the model."""
    found: list[Change] = []
    for change in changes:
        if change.config.scope == "model":
            survey = surveys.get(change.config)
            known = survey.converted if survey is not None else None
            parts = change.config.within(change.module) if known is None else known
            found += [Change(name, module, change.config) for name, module in parts]
        else:
            found.append(change)
    return found


def _estimate(model: nn.Module, plan: Plan, surveys: Surveys, batch: Any) -> Estimate:
    from .memory.estimating import estimate_change

    before, after = estimate_change(model, batch, lambda copy: rebuild_like(copy, plan.changes, surveys))
    return Estimate(
        kept_bytes=(before.saved_bytes, after.saved_bytes),
        peak_bytes=(before.peak_bytes, after.peak_bytes),
        phase=(before.phase, after.phase),
        recomputed=tuple(after.recomputed_modules),
    )


def restore_model(
    model: nn.Module,
    *,
    methods: Sequence[str] | None = None,
    adapters: str | None = None,
    allow_lossy: bool = False,
) -> Report:
    """Undo conversions in place: the original classes, objects and values are back, bit for bit where nothing was lost.

    Args:
        model: a model that was converted, or not (then nothing happens and the report says so).
        methods: names of the methods to take off; None means all.
        adapters: "merge" or "drop", required where adapters are present.
        allow_lossy: needed to take off a method that changed the function; what comes back is its dense equivalent.

    Raises:
        RestoreError: a named method is not applied, one of the two choices above is missing, or a module's class or
            forward was changed since. The model is unchanged.
    """
    _check_model(model, "restore_model")
    if adapters not in (None, "merge", "drop"):
        raise ValueError(f"restore_model: adapters: expected 'merge' or 'drop', got {adapters!r}. {_UNCHANGED}")
    modules = names_by_module(model)
    found = [Change(m.names[0], m.module, c) for m in modules for c in reversed(applied_configs(m.module).values())]
    present = {change.config.name for change in found}
    chosen = present if methods is None else set([methods] if isinstance(methods, str) else methods)
    problems: list[MemsaveError] = []
    if missing := sorted(chosen - present):
        problems.append(
            RestoreError(f"restore_model: {missing} not applied to this model; it has {sorted(present)}. {_UNCHANGED}")
        )
    changes = [change for change in found if change.config.name in chosen]
    # Trained adapters of a whole model go last: what comes off before them can be put back if something fails.
    changes.sort(key=lambda c: c.config.scope == "model" and c.config.guarantee is Guarantee.ADAPTER)
    problems += _restore_problems(changes, adapters, allow_lossy)
    raise_all(problems)
    kinds = {id(m.module): kind_of(m.module) for m in modules}
    rows = group_rows(_converted(changes, {}), kinds)
    unapply_changes(model, changes, adapters)
    return Report(action="restored", rows=rows)


def _restore_problems(changes: Sequence[Change], adapters: str | None, allow_lossy: bool) -> list[MemsaveError]:
    problems: list[MemsaveError] = []
    reasons = ((name or "the model", config.why_not_restore(module)) for name, module, config in changes)
    for name, reason in dict.fromkeys(reasons):
        if reason is not None:
            problems.append(RestoreError(f"restore_model: {name}: {reason}. {_UNCHANGED}"))
    for name, guarantee in sorted({(c.config.name, c.config.guarantee) for c in changes}):
        if guarantee is Guarantee.ADAPTER and adapters is None:
            problems.append(
                RestoreError(
                    f"restore_model: {name} holds trained adapters; say adapters='merge' or 'drop'. {_UNCHANGED}"
                )
            )
        if guarantee is Guarantee.APPROXIMATE and not allow_lossy:
            problems.append(
                RestoreError(
                    f"restore_model: {name} changed the function, and the original weights are gone; "
                    f"say allow_lossy=True to get its dense equivalent. {_UNCHANGED}"
                )
            )
    return problems


def _as_configs(model: nn.Module, configs: MethodConfig | Sequence[MethodConfig] | None) -> list[MethodConfig]:
    """Check both arguments; fill in the default methods."""
    from .methods import METHODS

    _check_model(model, "convert_model")
    if configs is None:
        return [method() for method in METHODS if method.default]
    single = isinstance(configs, (MethodConfig, str)) or not isinstance(configs, Sequence)
    listed: list[MethodConfig] = [configs] if single else list(configs)  # type: ignore[list-item, arg-type]
    # Configs of other packages' kinds, such as PEFT's, say themselves which method they stand for.
    listed = [c.as_method() if hasattr(c, "as_method") and not isinstance(c, type) else c for c in listed]
    for config in listed:
        if not isinstance(config, MethodConfig):
            named = next((m for m in METHODS if m.name == config), METHODS[-1])
            settings = "target_modules=[...]" if issubclass(named, TargetedConfig) and not named.default else ""
            hint = f"; pass a config object, for example {named.__name__}({settings})"
            if isinstance(config, type):
                hint = f" (did you mean {config.__name__}(...)?)"
            raise TypeError(f"convert_model: expected method configs, got {config!r}{hint}. {_UNCHANGED}")
    if not listed:
        raise ValueError(f"convert_model: expected at least one config, or None for the defaults; got []. {_UNCHANGED}")
    return list(dict.fromkeys(listed))


def _check_model(model: nn.Module, function: str) -> None:
    if isinstance(model, Report):
        raise NotAModelError(f"{function}: {NOT_A_MODEL}. Nothing was changed.")
    if not isinstance(model, nn.Module):
        instance = f"an instance of {type(model).__name__}"
        got = f"the class {model.__name__}, not an instance" if isinstance(model, type) else instance
        raise TypeError(f"{function}: expected a torch.nn.Module, got {got}. Nothing was changed.")
    if reason := wrapping(model):
        raise UnsupportedModelError(f"{reason}. {_UNCHANGED}")
