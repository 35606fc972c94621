"""Optimizers that were made before a conversion gave the model other parameters: noticed when they step.

torch tells of every step of every optimizer (`register_optimizer_step_pre_hook`). From a conversion that changed the
parameters until an optimizer of the model has stepped twice, its steps are looked at; no parameter is kept alive.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .errors import UnsupportedModelError

_ORDER = "convert first, and make the optimizer of model.parameters() afterwards"


@contextmanager
def watching_parameters(model: nn.Module) -> Iterator[None]:
    """Watch optimizers from now on, if the block gives `model` other parameters."""
    before = [weakref.ref(p) for p in model.parameters()]  # a conversion may free them one by one
    yield
    after = {id(p) for p in model.parameters()}
    gone = [p for p in _alive(before) if id(p) not in after]
    still = {id(p) for p in _alive(before)} & after
    new = [p for p in model.parameters() if id(p) not in still]
    if gone or new:
        _watch(_Watch(model, gone, new))


class _Watch:
    """What one conversion took and gave.

    Args:
        model: that was converted.
        gone: parameters that it has no more.
        new: parameters that it has since.
    """

    def __init__(self, model: nn.Module, gone: list[nn.Parameter], new: list[nn.Parameter]) -> None:
        self.model = weakref.ref(model)
        self._gone = [weakref.ref(p) for p in gone]
        self._new = [weakref.ref(p) for p in new]
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._trained: set[int] = set()

    def is_needed(self) -> bool:
        """Whether anything of what it watches is still there: after `restore_model`, often nothing is."""
        return self.model() is not None and next(_alive([*self._gone, *self._new]), None) is not None

    def is_over(self, optimizer: Optimizer) -> bool:
        """Look at the step that `optimizer` is about to make; whether there is nothing more to look for.

        Raises:
            UnsupportedModelError: it holds parameters that the model has no more.
        """
        model = self.model()
        if model is None:
            return True
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        present = {id(p): name for name, p in model.named_parameters()}
        gone = [p for p in _alive(self._gone) if id(p) in held and id(p) not in present]
        if gone:
            raise UnsupportedModelError(
                f"convert_model took {len(gone)} of the parameters that {type(optimizer).__name__} holds out of the "
                f"model, so it would not train what is there instead; {_ORDER}. The step was not made."
            )
        if not held & present.keys():
            return False  # another model's
        again = optimizer in self._stepped
        self._stepped.add(optimizer)
        self._trained |= held
        if again:  # by now every optimizer of the model has stepped
            self._warn([present[id(p)] for p in _alive(self._new) if self._is_missed(p, present)], optimizer)
        return again

    def _is_missed(self, parameter: Tensor, present: dict[int, str]) -> bool:
        missed = id(parameter) in present and id(parameter) not in self._trained
        return missed and parameter.requires_grad and parameter.grad is not None

    @staticmethod
    def _warn(missed: list[str], optimizer: Optimizer) -> None:
        if missed:
            warnings.warn(
                f"memsave: convert_model gave the model {len(missed)} parameters, {missed[0]} first, that get gradients"
                f" and that no optimizer trains: {type(optimizer).__name__} was made before; {_ORDER}",
                stacklevel=5,
            )


def _alive(references: list[weakref.ref[nn.Parameter]]) -> Iterator[nn.Parameter]:
    return (p for p in (reference() for reference in references) if p is not None)


_watches: list[_Watch] = []
_hook: Any = None


def _watch(watch: _Watch) -> None:
    global _hook
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)
    _watches[:] = [*(w for w in _watches if w.is_needed()), watch]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _watches[:] = [watch for watch in _watches if not watch.is_over(optimizer)]
