"""The parts of a routed feed-forward block: its linears, and which slices of their weights a block of units has.

F hidden units in G blocks of C = F / G; D features in, O out; rank r of the optional low-rank factors. A weight that
maps to hidden units is (F, D), or (2F, D) where gate and up are one linear; the one that maps from them is (O, F).
Those of `Conv1D` are stored transposed; all views here are as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...ops.activation import Activation

PARTS = ("weight", "bias", "lora_a", "lora_b")
"""The tensors of one linear, in the order in which the autograd Function takes them."""


@dataclass(frozen=True)
class Layout:
    """What a routed block is, besides its tensors.

    Attributes:
        blocks, active: G, and how many of them a token is sent to.
        activation: which function.
        linears: the names of the linears that read x: ("up",), ("gate", "up") or ("gate_up",).
        transposed: names of the linears whose weight is stored as `Conv1D` does, "down" among them.
        gate: which half of "gate_up" is activated.
        scaling: the factor of the low-rank product.
    """

    blocks: int
    active: int
    activation: Activation
    linears: tuple[str, ...]
    transposed: tuple[str, ...] = ()
    gate: int = 0
    scaling: float = 1.0

    @property
    def gated(self) -> bool:
        return self.linears != ("up",)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all linears, in the order in which the autograd Function takes them."""
        return (*self.linears, "down")

    def halves(self, num_rows: int) -> list[tuple[int, slice]]:
        """For gate and up, or up alone: which linear makes it, and which of its `num_rows` outputs it is."""
        if self.linears != ("gate_up",):
            return [(index, slice(None)) for index in range(len(self.linears))]
        half = num_rows // 2
        parts = [slice(0, half), slice(half, None)]
        return [(0, parts[self.gate]), (0, parts[1 - self.gate])]


class LinearPart(NamedTuple):
    """The tensors of one linear, y = W x + b + scaling B A x; also their gradients, None for those that need none.

    Attributes:
        weight: as it is stored.
        bias: or None.
        lora_a: (r, inputs), or None.
        lora_b: (outputs, r), or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None


def linear_parts(tensors: Sequence[Tensor | None]) -> list[LinearPart]:
    """The flat sequence of all linears' tensors, linear by linear."""
    return [LinearPart(*tensors[i : i + len(PARTS)]) for i in range(0, len(tensors), len(PARTS))]


class UnitRows(NamedTuple):
    """What maps x to the F units of gate or of up; views, or gradients of the same shapes.

    Attributes:
        linear: index of the linear.
        weight: (F, D).
        bias: (F,).
        lora_b: (F, r).
    """

    linear: int
    weight: Tensor | None
    bias: Tensor | None
    lora_b: Tensor | None

    def block(self, units: slice) -> UnitRows:
        """The same for some units."""
        return UnitRows(self.linear, *(None if t is None else t[units] for t in self[1:]))


def unit_rows(layout: Layout, parts: Sequence[LinearPart], num_units: int) -> list[UnitRows]:
    """Gate and up, or up alone."""
    num_rows = 2 * num_units if layout.linears == ("gate_up",) else num_units
    found = []
    for index, rows in layout.halves(num_rows):
        part = parts[index]
        weight = _untransposed(layout, index, part.weight)
        found.append(UnitRows(index, *(None if t is None else t[rows] for t in (weight, part.bias, part.lora_b))))
    return found


def down_weight(layout: Layout, part: LinearPart) -> Tensor | None:
    """(O, F)."""
    return _untransposed(layout, len(layout.linears), part.weight)


def _untransposed(layout: Layout, index: int, weight: Tensor | None) -> Tensor | None:
    return weight.t() if weight is not None and layout.names[index] in layout.transposed else weight
