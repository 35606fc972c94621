"""What a conversion did, or would do: a table to read and data to keep."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from torch import nn

from .config import MethodConfig
from .errors import NotAModelError
from .text import aligned, collapsed, groups, pattern

NOT_A_MODEL = (
    "this is a memsave Report, not the model: convert_model works in place; do not assign its result to the model "
    "(write `memsave.convert_model(model)` and go on using `model`)"
)


@dataclass(frozen=True)
class Row:
    """A group of modules that one method converted (or would convert, or had converted already)."""

    method: str
    modules: str
    count: int
    kind: str
    backend: str
    guarantee: str
    config: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Skip:
    """A group of modules that were left as they are, why, and their share of the model's parameter bytes."""

    modules: str
    count: int
    kind: str
    reason: str
    share: float
    names: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """The predicted bytes of forward and backward on one batch, each before and after the conversion.

    Attributes:
        kept_bytes: most kept for backward at one moment.
        peak_bytes: the peak of all live tensors; optimizer states are not in it.
        phase: when the peak is.
        recomputed: modules whose forward runs again in backward, by activation checkpointing.
    """

    kept_bytes: tuple[int, int]
    peak_bytes: tuple[int, int]
    phase: tuple[str, str]
    recomputed: tuple[str, ...] = ()

    def __str__(self) -> str:
        from .memory.profile import format_bytes

        rows = [
            (title, format_bytes(before), "->", format_bytes(after), f"{after / max(before, 1):.2f}x", note)
            for title, (before, after), note in (
                ("kept for backward", self.kept_bytes, ""),
                ("peak", self.peak_bytes, f"in {self.phase[1]}"),
            )
        ]
        lines = ["estimated for forward and backward on this batch:", *aligned(rows)]
        if self.recomputed:
            lines.append(
                f"activation checkpointing is on: {len(self.recomputed)} modules run again in backward, so what they "
                "keep lives only then, and converting them saves little; without checkpointing it saves more"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What `convert_model` or `restore_model` did. `print(report)` shows a table; it is not the model.

    Attributes:
        action: "converted", "would be converted (dry run)", "restored".
        rows: the groups of modules that the action is about.
        already: groups that were in that state before; nothing was done to them.
        skipped: groups that hold parameters and were left as they are.
        devices: the devices of the parameters.
        notes: what the methods say besides, such as a plan.
        estimate: what the conversion changes in bytes, if `convert_model` was given a batch.
    """

    action: str
    rows: tuple[Row, ...] = ()
    already: tuple[Row, ...] = ()
    skipped: tuple[Skip, ...] = ()
    devices: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = ()
    estimate: Estimate | None = None

    @property
    def count(self) -> int:
        """How many modules the action is about."""
        return len({name for row in self.rows for name in row.names})

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self) | {"count": self.count}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        where = f" on {', '.join(self.devices)}" if len(self.devices) > 1 else ""
        lines = [f"memsave: {self.count} module{'' if self.count == 1 else 's'} {self.action}{where}"]
        lines += aligned(_cells(self.rows, "") + _cells(self.already, ", already"))
        if self.skipped:
            lines.append("left as they are (share of the parameter bytes):")
            lines += aligned([(f"{s.share:.1%}", s.modules, f"x{s.count}", s.kind, s.reason) for s in self.skipped])
        lines += self.notes
        if self.estimate:
            lines.append(str(self.estimate))
        return "\n".join(lines)

    __repr__ = __str__

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise NotAModelError(NOT_A_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        if name in _MODEL_NAMES:
            raise NotAModelError(NOT_A_MODEL)
        raise AttributeError(f"Report has no attribute {name!r}")


_MODEL_NAMES = {name for name in dir(nn.Module) if not name.startswith("_")} | {
    *("config", "device", "dtype", "generate", "save_pretrained", "training")
}


def _cells(rows: Sequence[Row], ending: str) -> list[tuple[str, ...]]:
    """The cells of each row; rows of several methods on the same modules are one row, `recompute_{norm,mlp}`."""
    methods: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        rest = (row.modules, f"x{row.count}", row.kind, row.backend, row.guarantee + ending)
        methods.setdefault(rest, []).append(row.method)
    return [(_joined(names), *rest) for rest, names in methods.items()]


def _joined(methods: Sequence[str]) -> str:
    """`recompute_{norm,mlp}, share_mask`: names with the same first word as one."""
    families: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        families.setdefault(method.partition("_")[0], []).append(method)
    return ", ".join(map(collapsed, families.values()))


def group_rows(converted: Iterable[tuple[str, nn.Module, MethodConfig]], kinds: dict[int, str]) -> tuple[Row, ...]:
    """Rows for (qualified name, module, config) triples; `kinds` holds the class name of each module by id."""
    keys = (
        ((c.name, kinds[id(module)], c.backend(module), str(c.guarantee), str(c)), name)
        for name, module, c in converted
    )
    return tuple(
        Row(method, pattern(names), len(names), kind, backend, guarantee, config, tuple(names))
        for (method, kind, backend, guarantee, config), names in groups(keys)
    )


def group_skips(skipped: Sequence[tuple[str, str, str, float]]) -> tuple[Skip, ...]:
    """Rows for (qualified name, class name, reason, share) of what was left, largest share first."""
    shares = {name: share for name, _, _, share in skipped}
    rows = [
        Skip(pattern(names), len(names), kind, reason, sum(shares[name] for name in names), tuple(names))
        for (kind, reason), names in groups(((kind, reason), name) for name, kind, reason, _ in skipped)
    ]
    return tuple(sorted(rows, key=lambda row: -row.share))
