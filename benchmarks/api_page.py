"""The reference of every public name, from its signature and docstring: the block `<!-- api -->` of docs/api.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import memsave

GROUPS: dict[str, tuple[str, ...]] = {
    "Convert and restore": ("convert_model", "restore_model", "Report", "Guarantee", "MethodConfig"),
    "Methods": (
        "RecomputeNormConfig",
        "RecomputeActivationConfig",
        "RecomputeDropoutConfig",
        "RecomputeMLPConfig",
        "ShareMaskConfig",
        "LinearCrossEntropyConfig",
        "WTACRSConfig",
        "SparseMHAConfig",
        "RoutedFFNConfig",
        "FlashSVDConfig",
        "PatchConvConfig",
    ),
    "What methods come with": (
        "linear_cross_entropy",
        "sample_ids",
        "sample_cache_bytes",
        "low_rank_cache",
        "patch_plans",
    ),
    "Adapters": ("SHiRAConfig", "LaMDAConfig", "save_adapter", "load_adapter", "fuse_adapters", "export"),
    "Training": ("MemsaveCallback",),
    "Save and load": ("save", "load"),
    "Measure and explain": (
        "saved_bytes",
        "measure",
        "estimate",
        "MemoryProfile",
        "explain",
        "Explanation",
        "oom_report",
        "OOMReport",
        "backends",
    ),
    "Errors": (
        "MemsaveError",
        "ConversionError",
        "NoMatchError",
        "ConflictError",
        "UnsupportedModelError",
        "RestoreError",
        "NotAModelError",
        "SaveError",
        "LoadError",
        "EstimateError",
    ),
}

_SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
_ITEM = re.compile(r"^(?P<names>[\w*][\w*, ]*|Whatever[^:]*): (?P<text>.*)$")


def api() -> str:
    """All groups as Markdown."""
    return "\n".join(line for title, names in GROUPS.items() for line in _group(title, names)).rstrip()


def _group(title: str, names: tuple[str, ...]) -> Iterator[str]:
    yield from (f"## {title}", "")
    for name in names:
        thing = getattr(memsave, name)
        yield from (f"### `memsave.{name}`", "")
        if (signature := _signature(name, thing)) is not None:
            yield from ("```text", signature, "```", "")
        yield from _markdown(inspect.getdoc(thing) or "")
        if docs := getattr(thing, "docs", ""):
            yield from (f"The method and its sources: [{docs}]({docs.removeprefix('docs/')}).", "")


def _signature(name: str, thing: object) -> str | None:
    if inspect.isclass(thing) and not name.endswith(("Config", "Callback")):
        return None
    of_peft = _fields_of_peft(thing) if inspect.isclass(thing) else set()
    shown: list[str] = []
    for parameter in inspect.signature(thing).parameters.values():  # type: ignore[arg-type]
        if parameter.name in of_peft:
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(str(parameter.replace(annotation=inspect.Parameter.empty)))
    line = f"{name}({', '.join(shown)})"
    return line if len(line) <= 110 else f"{name}(\n" + "".join(f"    {p},\n" for p in shown) + ")"


def _fields_of_peft(config: type) -> set[str]:
    """The fields that every config of PEFT has; PEFT documents them."""
    bases = [vars(base).get("__annotations__", {}) for base in config.__mro__ if base.__module__.startswith("peft.")]
    return {name for fields in bases for name in fields} - set(vars(config).get("__annotations__", {}))


def _markdown(doc: str) -> Iterator[str]:
    """A docstring in Google's style as Markdown: its sections become lists."""
    in_section = False
    for line in doc.splitlines():
        if found := _SECTION.match(line):
            in_section = True
            yield from (f"**{found[1]}**", "")
            continue
        in_section = in_section and (not line or line.startswith(" "))
        if not in_section:
            yield line
        elif line.startswith(" " * 8):
            yield f"  {line.strip()}"
        elif item := _ITEM.match(line.strip()):
            yield f"- `{item['names']}`: {item['text']}"
        else:
            yield line.strip()
    yield ""
