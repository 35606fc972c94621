"""Messages for entries of `target_modules` and `exclude_modules` that lead to nothing: every suggestion works."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch import nn

from .config import TargetedConfig, matches

_REGEX_CHARACTERS = frozenset("*+?[](){}^$|\\")


class Named(NamedTuple):
    """A module with all its qualified names; the first is the one it is reported by."""

    module: nn.Module
    names: Sequence[str]


def names_by_module(model: nn.Module) -> list[Named]:
    """Every module once, in order, with every qualified name that it has."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), (module, []))[1].append(name)
    return [Named(module, names) for module, names in found.values()]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that `module` had before it was converted."""
    return getattr(type(module), "_memsave_base", type(module))


def entries_of(targets: str | Collection[str]) -> list[str]:
    """The entries of a target filter, each of which must match."""
    return [targets] if isinstance(targets, str) else list(targets)


def missed_target(config: TargetedConfig, entry: str, refused: str | None, modules: Sequence[Named]) -> str:
    """Say why `entry` of the targets ("" for no targets) selects nothing; `refused` is why its matches cannot be used.

    The nearest names and all that the method can convert are named.
    """
    if not entry:
        return f"the model has no module that {config.name} can convert{f': {refused}' if refused else ''}"
    convertible = [m for m in modules if m.names[0] and config.candidate(m.module)]
    rule = entry if isinstance(config.target_modules, str) else (entry,)
    others = _matching(rule, modules)
    if not others and not _matching((entry,), convertible):
        others = _matching((entry,), modules)  # a name for a regular expression: its list form would not do either
    if refused:
        what = f"matches only what cannot be converted ({refused})"
    elif others:
        what = f"matches only modules that {config.name} does not convert ({_kinds(others, modules)})"
        if held := _held(config, others):
            what += f"; it holds {', '.join(held)}"
    else:
        what = "matches no module" + _meant(rule, convertible)
    counts = Counter(m.names[0].rpartition(".")[2] for m in convertible)
    listing = ", ".join(f"{name} x{n}" for name, n in counts.most_common(12)) or "none"
    return f"{config.label}.target_modules: {entry!r} {what}. {config.name} can convert: {listing}"


def missed_exclusions(config: TargetedConfig, modules: Sequence[Named]) -> list[str]:
    """Say which entries of the exclusions match no module at all, such as misspelt ones."""
    excluded = config.exclude_modules
    rules = [excluded] if isinstance(excluded, str) else [(entry,) for entry in excluded or ()]
    return [
        f"{config.label}.exclude_modules: {entries_of(rule)[0]!r} matches no module{_meant(rule, modules)}"
        for rule in rules
        if not _matching(rule, modules)
    ]


def _matching(rule: str | Collection[str], modules: Sequence[Named]) -> list[Named]:
    """Those of `modules` that `rule` matches by any of their names; none for a string that is no regular expression."""
    try:
        return [m for m in modules if any(matches(rule, name) for name in m.names)]
    except re.error:
        return []


def _meant(rule: str | Collection[str], modules: Sequence[Named]) -> str:
    """In brackets: what was probably meant by `rule`, which matches none of `modules` (those that it may match)."""
    (entry,) = entries_of(rule)
    if entry == "all-linear":
        return " ('all-linear' is PEFT's shorthand; use r'.*')"
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for m in modules for name in m.names if name))
    head, dot, tail = entry.rpartition(".")
    near = difflib.get_close_matches(tail, last_parts, n=1)
    like_a_name = not _REGEX_CHARACTERS & set(entry)
    if not isinstance(rule, str):
        if not like_a_name:
            regexes = (entry, f".*{entry}", entry.replace("*", ".*"), r".*_proj")
            found = next((regex for regex in regexes if _matching(regex, modules)), regexes[-1])
            return f" (a list holds names or endings; for a regular expression pass the string r'{found}')"
        return f" (did you mean {near[0]!r}?)" if near else ""
    if like_a_name:
        names = [entry] if _matching((entry,), modules) else near
        hint = f"did you mean {names!r}?" if names else "a list holds names or endings"
        return f" (a string is a regular expression for the whole name; {hint})"
    if not near:
        return ""
    mended = f"{head}{dot}{near[0]}"
    meant = f"r'{mended}'" if _matching(mended, modules) else repr(near)
    return f" (did you mean {meant}?)"


def _kinds(chosen: Sequence[Named], modules: Sequence[Named]) -> str:
    """The classes of `chosen`, with their modules where another class of the model or of torch has that name too."""
    known = {base_class(m.module) for m in modules}
    kinds = set()
    for cls in {base_class(m.module) for m in chosen}:
        namesakes = {other for other in known if other.__name__ == cls.__name__} | {getattr(nn, cls.__name__, cls)}
        kinds.add(f"{cls.__module__}.{cls.__qualname__}" if len(namesakes) > 1 else cls.__name__)
    return ", ".join(sorted(kinds))


def _held(config: TargetedConfig, chosen: Sequence[Named]) -> list[str]:
    """Up to three names, fit for a list of targets, of convertible modules within `chosen`."""
    held = {
        f"{m.names[0].rpartition('.')[2]}.{name}".lstrip("."): None
        for m in chosen
        for name, child in m.module.named_modules()
        if name and config.candidate(child)
    }
    return list(held)[:3]
