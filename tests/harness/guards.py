"""Memory with guards: what is read or written outside a tensor, or read before it was written, shows in the results.

Every tensor lies in the middle of a larger buffer. Around an input there is NaN, or for integers a value of the tensor
itself: a row number read there is still a row. New tensors are surrounded, too, and those without values are filled,
with one value or another. After the run nothing but the inside of new tensors may be different.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# On each side, in elements: more than one block of any kernel, so that a forgotten mask stays inside. A multiple of 16,
# so that addresses are aligned as before.
GUARD = 2**14

# What unwritten memory holds. NaN shows in sums, but not where it is compared: hence also a large number. Integers hold
# the largest one, as in torch's deterministic mode, and a small one.
FILLS: dict[str, tuple[float, int | None]] = {"NaN": (float("nan"), None), "12345": (12345.0, 1)}


def extent(tensor: Tensor) -> int:
    """Elements from the first to the last one of a tensor with strides."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(a.element_size(), torch.int64)
    return torch.equal(a.view(integers), b.view(integers))


@dataclass
class Guarded:
    """A tensor in the middle of a buffer.

    Attributes:
        buffer: (guard + extent + guard,), with `tensor` as a view into it from `begin` on.
        fill: what the guards hold.
        before: a copy of the buffer of an input; None for memory that may be written.
    """

    tensor: Tensor
    buffer: Tensor
    begin: int
    fill: float | int | bool
    before: Tensor | None = None

    def change(self, written: bool = False) -> str | None:
        """What was written that must not be, in words. `written`: the elements may be, but not what lies between."""
        end = self.begin + extent(self.tensor)
        for name, place in (("before", slice(0, self.begin)), ("behind", slice(end, None))):
            border = self.buffer[place]
            if not same_bytes(border, torch.full_like(border, self.fill)):
                return f"written {name} its memory"
        if self.before is not None:
            allowed = self.before.clone()
            if written:
                allowed.as_strided(self.tensor.shape, self.tensor.stride(), self.begin).copy_(self.tensor)
            if not same_bytes(self.buffer, allowed):
                return "modified in place" if not written else "written between its elements"
        return None


def place(tensor: Tensor, fill: float | int | bool, device: torch.device | str) -> Guarded:
    """A new tensor of the same shape, strides and alignment, in a buffer full of `fill`."""
    begin = GUARD + tensor.storage_offset() % 16
    buffer = torch.full((begin + extent(tensor) + GUARD,), fill, dtype=tensor.dtype, device=device)
    return Guarded(buffer.as_strided(tensor.shape, tensor.stride(), begin), buffer, begin, fill)


def guarded(tensor: Tensor, device: torch.device | str) -> Guarded:
    """The same values and strides on a device, between guards."""
    fill: float | int | bool = float("nan")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        fill = tensor.max().item() if tensor.numel() else 0
    found = place(tensor, fill, device)
    # Elements that lie on one place (expanded tensors) are written once.
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())
    found.tensor[once].copy_(tensor[once])
    found.before = found.buffer.clone()
    return found


_ATEN = torch.ops.aten
_WITHOUT_VALUES = {_ATEN.empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty, _ATEN.new_empty_strided}
_WITH_VALUES = {
    *(_ATEN.zeros, _ATEN.zeros_like, _ATEN.new_zeros, _ATEN.full, _ATEN.full_like, _ATEN.new_full),
    *(_ATEN.ones, _ATEN.ones_like, _ATEN.new_ones),
}


class GuardedMemory(TorchDispatchMode):
    """Inside the block, new tensors lie between guards, and those without values are filled.

    The results of other operators do not: kernels write to memory that was made for them.

    Args:
        fill: a key of `FILLS`.

    Attributes:
        found: all that was allocated.
    """

    def __init__(self, fill: str) -> None:
        super().__init__()
        self.fill = fill
        self.found: list[Guarded] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket not in _WITHOUT_VALUES | _WITH_VALUES or result.device.type == "meta":
            return result
        self.found.append(place(result, self._value(result), result.device))
        if func.overloadpacket in _WITH_VALUES:
            self.found[-1].tensor.copy_(result)
        return self.found[-1].tensor

    def _value(self, tensor: Tensor) -> float | int:
        floats, integers = FILLS[self.fill]
        if tensor.is_floating_point() or tensor.is_complex():
            return floats
        largest = 1 if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max
        return largest if integers is None else integers
