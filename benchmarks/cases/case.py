"""What all benchmark cases share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from typing_extensions import Self


def short(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


LONG_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure, as data. How each kind is measured is in `benchmarks/runners/`.

    Attributes:
        name: of the case and of its result file.
        title: what it measures; stands below its table.
        method: the method of memsave that it is about, if it is about one.
        devices: where it runs: "cpu", "cuda" or both.
        expected_s: seconds that it takes, about; with less time left it is not started.
        tiny: the fields that change for a dry run at toy size.
    """

    kind: ClassVar[str]

    name: str
    title: str
    method: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    expected_s: float = 8.0
    tiny: Mapping[str, Any] = field(default_factory=dict)

    @property
    def long(self) -> bool:
        """Whether it takes so long that a run of all cases leaves it out unless asked."""
        return self.expected_s > LONG_S

    def at_toy_size(self) -> Self:
        return replace(self, **self.tiny)

    def describe(self) -> dict[str, Any]:
        """What a result file says about its case, as plain data."""
        described = {"kind": self.kind, "name": self.name, "title": self.title}
        return described | ({"method": self.method} if self.method else {})
