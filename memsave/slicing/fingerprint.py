"""Whether a module is still what was traced: a plan holds for its modules and their settings, not for its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

SET_BY_LIBRARIES = ("_output_capturing_hooks_installed",)  # by transformers, in the first call
# What every module keeps for itself, and what a call must look at anew.
_INTERNAL = frozenset((*nn.Module().__dict__, "forward", *SET_BY_LIBRARIES))


class Fingerprint:
    """The modules within a module, their classes and attributes, and which parameters they lack.

    Attributes:
        tree: the modules.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tree = tuple(walk(module))
        self._states = [_state(m) for m in self.tree]
        self._values = _values(self.tree)
        tensors = [held for m in self.tree for held in (m._parameters, m._buffers)]
        self._absent = [(held, key) for held in tensors for key, value in held.items() if value is None]

    def holds(self, tree: tuple[nn.Module, ...]) -> bool:
        """Whether nothing has changed, for the modules as they are now."""
        if tree != self.tree or any(held.get(key) is not None for held, key in self._absent):
            return False
        values = _values(tree)
        if not same(values, self._values):  # most calls end here: objects that are the same are not compared
            if not same([_state(m) for m in tree], self._states):
                return False
            self._values = values
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Fingerprint:
        copied = type(self).__new__(type(self))
        copied.tree = copy.deepcopy(self.tree, memo)
        copied._states, copied._absent = copy.deepcopy((self._states, self._absent), memo)
        copied._values = []
        return copied


def walk(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, without the bookkeeping of `modules()`; a shared one comes as often as it is held."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from walk(child)


def same(a: Any, b: Any) -> bool:
    """Whether both are equal; what cannot be compared is not."""
    try:
        return bool(a == b)
    except Exception:
        return False


def _values(tree: tuple[nn.Module, ...]) -> list[tuple[Any, ...]]:
    return [(type(m), *m.__dict__.values()) for m in tree]


def _state(module: nn.Module) -> list[Any]:
    kept = {k: v for k, v in module.__dict__.items() if k not in _INTERNAL and not k.startswith("_memsave")}
    return [type(module), kept]
