"""Running a program on live tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .assembling import Program
from .program import execute


def run(program: Program, leaves: Sequence[Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    """The leaves of the output, for the leaves of the call's arguments."""
    slots: list[Any] = [None] * program.slots
    for leaf, slot in program.inputs.items():
        slots[slot] = leaves[leaf]
    for name, slot in program.tensors.items():
        slots[slot] = tensors[name]
    for slot, value in program.constants.items():
        slots[slot] = value
    execute(program.steps, slots)
    return [value if slot is None else slots[slot] for slot, value in program.outputs]
