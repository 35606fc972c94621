"""convert_model and restore_model: plan everything, then apply it all or nothing. No method is known here by name.

The plan is made without touching the model, and every problem found is raised together. Applying keeps a log, and on
any exception the model is put back as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .config import Guarantee, MethodConfig, TargetedConfig, applied_configs, matches
from .errors import (
    ConflictError,
    MemsaveError,
    NoMatchError,
    NotAModelError,
    RestoreError,
    UnsupportedModelError,
    raise_all,
)
from .guard import guard_saving
from .report import NOT_A_MODEL, Estimate, Report, Skip, group_rows, group_skips, groups, pattern
from .targets import Named, base_class, entries_of, missed_exclusions, missed_target
from .wrappers import wrapping

_UNCHANGED = "The model was not changed."
_IS_ROOT = "it is the model itself, whose class never changes; put it in a container"


class Change(NamedTuple):
    name: str
    module: nn.Module
    config: MethodConfig


@dataclass
class _Plan:
    changes: list[Change] = field(default_factory=list)
    already: list[Change] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    problems: list[MemsaveError] = field(default_factory=list)


def convert_model(
    model: nn.Module,
    configs: MethodConfig | Sequence[MethodConfig] | None = None,
    *,
    batch: Any = None,
    dry_run: bool = False,
) -> Report:
    """Convert `model` in place and return a report; the result is not the model.

    Args:
        model: any module that is not wrapped (DDP, FSDP, compiled) yet. Parameters stay the same objects unless a
            method says otherwise, so an optimizer made before goes on working.
        configs: one config or several; None applies every method whose guarantee is exact and whose `default` is set.
        batch: what the model is called with, as `memsave.estimate` takes it. The report then has the bytes that
            forward and backward need before and after, predicted by fake tensors.
        dry_run: plan and report without changing anything.

    Raises:
        EstimateError: the step on `batch` cannot be predicted; see `memsave.estimate`.
        NoMatchError: a target matches nothing, or nothing that its method converts.
        ConflictError: two configs set the same part of one module differently, also across calls.
        UnsupportedModelError: the model is wrapped, or cannot be converted for a reason that is named.
        ConversionError: several of these at once, all listed. In every case the model is unchanged.
    """
    wanted = _as_configs(model, configs)
    modules = _names_by_module(model)
    plan = _plan(model, wanted, modules, defaults=configs is None)
    raise_all(plan.problems if configs is not None else _problems_of_defaults(plan, wanted, modules))
    kinds = {id(m.module): _kind(m.module) for m in modules}
    report = Report(
        action="would be converted (dry run)" if dry_run else "converted",
        rows=group_rows(plan.changes, kinds),
        already=group_rows(plan.already, kinds),
        skipped=_skipped(modules, plan, wanted),
        devices=tuple(sorted({str(p.device) for p in model.parameters()})),
        estimate=None if batch is None else _estimate(model, configs, batch),
    )
    if not dry_run:
        apply_changes(model, plan.changes)
    return report


def _estimate(model: nn.Module, configs: MethodConfig | Sequence[MethodConfig] | None, batch: Any) -> Estimate:
    from .memory.estimating import estimate_change

    before, after = estimate_change(model, batch, lambda copy: convert_model(copy, configs))
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
    modules = _names_by_module(model)
    found = [Change(m.names[0], m.module, c) for m in modules for c in reversed(applied_configs(m.module).values())]
    present = {change.config.name for change in found}
    chosen = present if methods is None else set([methods] if isinstance(methods, str) else methods)
    problems: list[MemsaveError] = []
    if missing := sorted(chosen - present):
        problems.append(
            RestoreError(f"restore_model: {missing} not applied to this model; it has {sorted(present)}. {_UNCHANGED}")
        )
    changes = [change for change in found if change.config.name in chosen]
    problems += _restore_problems(changes, adapters, allow_lossy)
    raise_all(problems)
    kinds = {id(m.module): _kind(m.module) for m in modules}
    rows = group_rows(changes, kinds)
    _unapply(model, changes, adapters)
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


def _names_by_module(model: nn.Module) -> list[Named]:
    """Every module once, in order, with every qualified name that it has."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    return [Named(module, names) for module, names in found.values()]


def _kind(module: nn.Module) -> str:
    return base_class(module).__name__


def _plan(model: nn.Module, configs: Sequence[MethodConfig], modules: Sequence[Named], *, defaults: bool) -> _Plan:
    plan = _Plan()
    planned: dict[int, dict[str, MethodConfig]] = {id(m.module): applied_configs(m.module) for m in modules}
    conflicts: list[tuple[str, str]] = []
    for config in configs:
        if isinstance(config, TargetedConfig):
            selected = _select(config, modules, plan)
        else:
            selected = _select_model(config, model, plan, defaults)
        for name, module in selected:
            present = planned[id(module)]
            earlier = present.get(config.name)
            if earlier == config or (earlier is not None and defaults and config.replaces_itself):
                plan.already.append(Change(name, module, earlier))
            elif conflict := _conflict(config, present, module):
                conflicts.append((conflict, name))
            else:
                present[config.name] = config
                plan.changes.append(Change(name, module, config))
    plan.problems += [ConflictError(f"{pattern(names)}: {why}. {_UNCHANGED}") for why, names in groups(conflicts)]
    return plan


def _select_model(config: MethodConfig, model: nn.Module, plan: _Plan, default: bool) -> list[tuple[str, nn.Module]]:
    """The model, if `config` of model scope can convert it; a default that cannot is named in the report at most."""
    applies = config.applies(model)
    reason = config.why_not(model) if applies else f"{_kind(model)} has nothing that it converts"
    if reason is None:
        return [("", model)]
    if not default:
        plan.problems.append(UnsupportedModelError(f"{config}: {reason}. {_UNCHANGED}"))
    elif applies:
        plan.reasons[id(model)] = f"{config.name}: {reason}"
    return []


def _problems_of_defaults(plan: _Plan, configs: Sequence[MethodConfig], modules: Sequence[Named]) -> list[MemsaveError]:
    """The problems of a call without configs: a default method may find nothing where another finds something."""
    problems = [problem for problem in plan.problems if not isinstance(problem, NoMatchError)]
    if not (problems or plan.changes or plan.already):
        reasons = [f"{m.names[0]}: {plan.reasons[id(m.module)]}" for m in modules if id(m.module) in plan.reasons]
        why = f": {reasons[0].removeprefix(': ')}" if reasons else ""
        names = [config.name for config in configs if isinstance(config, TargetedConfig)]
        methods = f"{', '.join(names[:-1])} or {names[-1]}" if names[1:] else "".join(names)
        problems.append(NoMatchError(f"the model has no module that {methods} can convert{why}. {_UNCHANGED}"))
    return problems


def _conflict(config: MethodConfig, present: dict[str, MethodConfig], module: nn.Module) -> str | None:
    """Say why `config` cannot join the configs that `module` has or will have."""
    earlier = present.get(config.name)
    applied = applied_configs(module).get(config.name)
    if earlier is not None and earlier is not applied:
        return f"{config} and {earlier} were both asked for; leave one of them out"
    if applied is not None and not config.replaces_itself:
        return (
            f"{config} was asked for, but it is converted by {earlier}; restore that one first: "
            f'memsave.restore_model(model, methods=["{config.name}"])'
        )
    mine = config.parts(module)
    for other in present.values():
        theirs = {} if other is earlier else other.parts(module)
        if both := sorted(part for part in mine.keys() & theirs.keys() if mine[part] != theirs[part]):
            return f"{config} and {other} both set {', '.join(both)}, differently; leave one of them out"
    return None


def _select(config: TargetedConfig, modules: Sequence[Named], plan: _Plan) -> list[tuple[str, nn.Module]]:
    """The modules that `config` converts; reasons for the rest and problems go to the plan."""
    selected: list[tuple[str, nn.Module]] = []
    hits: Counter[str] = Counter()
    refused: dict[str, str] = {}
    targets, excluded = config.target_modules, config.exclude_modules
    within = _within(config.name, modules)
    found = {id(module) for module in config.found_in([m.module for m in modules])} if targets is None else set()
    for module, names in modules:
        name, done = names[0], config.name in applied_configs(module)
        entries = {""} if targets is None else {entry for n in names for entry in matches(targets, n)}
        if not entries or not (done or id(module) in found if targets is None else done or config.candidate(module)):
            continue
        if id(module) in within:
            plan.reasons[id(module)] = f"within what {config.name} converted"
            continue
        if excluded is not None and any(matches(excluded, n) for n in names):
            refused |= dict.fromkeys(entries, "every match is excluded")
            plan.reasons[id(module)] = f"excluded from {config.name}"
            continue
        reason = config.why_not(module) if name else _IS_ROOT
        if reason and not done:
            refused |= dict.fromkeys(entries, f"{name}: {reason}" if name else reason)
            plan.reasons[id(module)] = reason
            continue
        hits.update(entries)
        selected.append((name, module))
    selected += _companions(config, selected, modules)
    wanted = [""] if targets is None else entries_of(targets)
    missed = [missed_target(config, entry, refused.get(entry), modules) for entry in wanted if not hits[entry]]
    missed += missed_exclusions(config, modules)
    plan.problems += [NoMatchError(f"{message}. {_UNCHANGED}") for message in missed]
    return selected


def _companions(
    config: TargetedConfig, selected: Sequence[tuple[str, nn.Module]], modules: Sequence[Named]
) -> list[tuple[str, nn.Module]]:
    """What is converted with the selected modules and is not selected itself."""
    first_names = {id(m.module): m.names[0] for m in modules}
    chosen = {id(module) for _, module in selected}
    found: dict[int, nn.Module] = {}
    for _, module in selected:
        for name in config.companions(module):
            child = module.get_submodule(name)
            excluded = config.exclude_modules is not None and matches(config.exclude_modules, first_names[id(child)])
            if id(child) not in chosen and not excluded and config.why_not(child) is None:
                found[id(child)] = child
    return [(first_names[key], child) for key, child in found.items()]


def _within(method: str, modules: Sequence[Named]) -> set[int]:
    """Ids of what lies within a module that `method` converted, such as the base that an adapter wraps."""
    converted = [m.module for m in modules if method in applied_configs(m.module)]
    inner = (m for module in converted for m in module.modules())
    return {id(m) for m in inner if method not in applied_configs(m)}


def _skipped(modules: Sequence[Named], plan: _Plan, configs: Sequence[MethodConfig]) -> tuple[Skip, ...]:
    """Rows for the modules that hold parameters of their own and that no config of this call converts."""
    done = {id(change.module) for change in [*plan.changes, *plan.already]}
    targeted = [config for config in configs if isinstance(config, TargetedConfig)]
    held = {id(p): p for m in modules for p in m.module._parameters.values() if p is not None}
    total = max(sum(p.nbytes for p in held.values()), 1)
    rows = []
    for module, names in modules:
        own = [p for p in module._parameters.values() if p is not None]
        if id(module) not in done and ((own and targeted) or id(module) in plan.reasons):
            reason = plan.reasons.get(id(module)) or _why_left(module, targeted)
            rows.append((names[0], _kind(module), reason, sum(p.nbytes for p in own) / total))
    return group_skips(rows)


def _why_left(module: nn.Module, configs: Sequence[TargetedConfig]) -> str:
    methods = "/".join(sorted({config.name for config in configs}))
    if any(config.candidate(module) for config in configs):
        return "not targeted"
    dimensions = max(p.dim() for p in module._parameters.values() if p is not None)
    if dimensions > 2 and not hasattr(module, "kernel_size"):
        return f"holds {dimensions}-D parameters: no linear for {methods}"
    return f"not a kind that {methods} converts"


def _convert(change: Change, module: nn.Module) -> nn.Module:
    return change.config.convert(module)


def apply_changes(
    model: nn.Module,
    changes: Iterable[Change],
    convert: Callable[[Change, nn.Module], nn.Module] = _convert,
) -> None:
    """Convert one module at a time; on any exception, also of the iterable, undo all of it."""
    current: dict[str, nn.Module] = {}
    undo: list[Callable[[], None]] = []
    try:
        for change in changes:
            name, module, config = change
            old = current.get(name, module)
            if old is not module and isinstance(config, TargetedConfig) and not config.candidate(old):
                other = next(iter(applied_configs(old).values()), "another method")
                raise ConflictError(f"{other} replaces {name}, so {config} cannot convert it. {_UNCHANGED}")
            earlier = applied_configs(old).get(config.name)
            new = convert(change, old)
            undo.append(lambda old=old, new=new, c=config, e=earlier: _put_back(model, new, old, c, e))  # type: ignore[misc]
            if new is not old:
                if config.scope == "model":
                    raise TypeError(f"{config}: a method of model scope must return the model itself")
                new.train(old.training)
                _replace(model, old, new)
            new.__dict__.setdefault("_memsave", {})[config.name] = config
            current[name] = new
        guard_saving(model)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _put_back(
    model: nn.Module, new: nn.Module, old: nn.Module, config: MethodConfig, earlier: MethodConfig | None
) -> None:
    if new is old and earlier is not None:
        earlier.convert(new).__dict__["_memsave"][config.name] = earlier
    elif new is old:
        config.restore(new, adapters="drop")
        _forget(new, config)
    else:
        _replace(model, new, old)


def _unapply(model: nn.Module, changes: Sequence[Change], adapters: str | None) -> None:
    """Restore one module at a time; on any exception convert again what was restored."""
    current: dict[int, nn.Module] = {}
    undo: list[Callable[[], None]] = []
    try:
        for _, module, config in changes:
            new = current.get(id(module), module)
            record = applied_configs(new)
            old = config.restore(new, adapters=adapters)
            undo.append(lambda old=old, new=new, c=config, r=record: _convert_again(model, old, new, c, r))  # type: ignore[misc]
            if old is not new:
                old.train(new.training)
                _replace(model, new, old)
            _forget(old, config)
            current[id(module)] = old
        guard_saving(model)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _convert_again(
    model: nn.Module, old: nn.Module, new: nn.Module, config: MethodConfig, record: dict[str, MethodConfig]
) -> None:
    """`record` is what was applied before, oldest first."""
    if new is old:
        config.convert(old).__dict__["_memsave"] = record
    else:
        _replace(model, old, new)


def _forget(module: nn.Module, config: MethodConfig) -> None:
    """Drop the record of `config` where the method keeps none of its own."""
    record = module.__dict__.get("_memsave")
    if record is not None:
        record.pop(config.name, None)
        if not record:
            del module.__dict__["_memsave"]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is a child."""
    for parent, name in list(_places(model, old)):
        setattr(parent, name, new)


def _places(model: nn.Module, child: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is child:
                yield parent, name
