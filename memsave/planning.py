"""Planning a conversion: what each config converts, what is left and why, and every problem. Nothing is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from .applying import Change
from .config import Guarantee, MethodConfig, TargetedConfig, applied_configs, matches
from .errors import ConflictError, MemsaveError, NoMatchError, UnsupportedModelError
from .report import Skip, group_skips
from .targets import Named, base_class, entries_of, missed_exclusions, missed_target
from .text import groups, pattern

_UNCHANGED = "The model was not changed."
_NO_KIND = "not a kind that"
_IS_ROOT = "it is the model itself, whose class never changes; put it in a container"


@dataclass
class Plan:
    changes: list[Change] = field(default_factory=list)
    already: list[Change] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    problems: list[MemsaveError] = field(default_factory=list)


def kind_of(module: nn.Module) -> str:
    return base_class(module).__name__


def plan_changes(
    model: nn.Module, configs: Sequence[MethodConfig], modules: Sequence[Named], *, defaults: bool
) -> Plan:
    plan = Plan()
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
    if defaults:
        plan.changes = _without_idle(plan)
    return plan


def _without_idle(plan: Plan) -> list[Change]:
    """The changes, without those of methods that would only set on a linear what another method sets there, too."""
    kept = list(plan.changes)
    for name in reversed(dict.fromkeys(change.config.name for change in plan.changes)):
        mine = [change for change in kept if change.config.name == name]
        others = {id(c.module) for c in (*kept, *plan.already) if c.config.name != name}
        if all(id(c.module) in others and c.config.scope == "modules" and not c.config.parts(c.module) for c in mine):
            kept = [change for change in kept if change.config.name != name]
    return kept


def _select_model(config: MethodConfig, model: nn.Module, plan: Plan, default: bool) -> list[tuple[str, nn.Module]]:
    """The model, if `config` of model scope can convert it; a default that cannot is named in the report at most."""
    if missed := config.missed(model):
        plan.problems += [NoMatchError(f"{message}. {_UNCHANGED}") for message in missed]
        return []
    applies = config.applies(model)
    reason = config.why_not(model) if applies else f"{kind_of(model)} has nothing that it converts"
    if reason is None:
        return [("", model)]
    if not default:
        plan.problems.append(UnsupportedModelError(f"{config}: {reason}. {_UNCHANGED}"))
    elif applies:
        plan.reasons[id(model)] = f"{config.name}: {reason}"
    return []


def problems_of_defaults(plan: Plan, configs: Sequence[MethodConfig], modules: Sequence[Named]) -> list[MemsaveError]:
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


def _select(config: TargetedConfig, modules: Sequence[Named], plan: Plan) -> list[tuple[str, nn.Module]]:
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


def skipped(modules: Sequence[Named], plan: Plan, configs: Sequence[MethodConfig]) -> tuple[Skip, ...]:
    """Rows for the modules that hold parameters of their own and that no config of this call converts.

    What other methods converted earlier is named only if this call could have converted it.
    """
    done = {id(change.module) for change in [*plan.changes, *plan.already]}
    targeted = [config for config in configs if isinstance(config, TargetedConfig)]
    adapters = [config for config in configs if config.guarantee is Guarantee.ADAPTER and config.scope == "model"]
    for config in adapters:
        done |= {id(inner) for _, module in config.within(modules[0].module) for inner in module.modules()}
    held = {id(p): p for m in modules for p in m.module._parameters.values() if p is not None}
    total = max(sum(p.nbytes for p in held.values()), 1)
    rows = []
    for module, names in modules:
        own = [p for p in module._parameters.values() if p is not None]
        if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
            continue  # the parameters are those of the module around it, an adapter's layer
        if id(module) not in done and ((own and (targeted or adapters)) or id(module) in plan.reasons):
            reason = plan.reasons.get(id(module)) or _why_left(module, targeted, adapters)
            if reason.startswith(_NO_KIND) and applied_configs(module):
                continue
            rows.append((names[0], kind_of(module), reason, sum(p.nbytes for p in own) / total))
    return group_skips(rows)


def _why_left(module: nn.Module, configs: Sequence[TargetedConfig], adapters: Sequence[MethodConfig]) -> str:
    if not configs:
        return f"frozen: not targeted by {', '.join(sorted(config.name for config in adapters))}"
    names = sorted({config.name for config in configs})
    methods = f"{names[0]} converts" if len(names) == 1 else "these methods convert"
    if any(config.candidate(module) for config in configs):
        return "not targeted"
    dimensions = max(p.dim() for p in module._parameters.values() if p is not None)
    if dimensions > 2 and not hasattr(module, "kernel_size"):
        return f"holds {dimensions}-D parameters: {_NO_KIND} {methods}"
    return f"{_NO_KIND} {methods}"
