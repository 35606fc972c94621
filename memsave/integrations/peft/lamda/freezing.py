"""LaMDA's schedule: B is frozen from the largest singular value on while training runs.

After t of T optimizer steps the first floor(r t / (freeze_until T)) rows of B are due; a segment is frozen when all of
its rows are: no gradient, no optimizer state. This is the only place where memsave touches an optimizer.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ....errors import MemsaveError
from .layer import LaMDALinear


class HasState(Protocol):
    """An optimizer, or accelerate's wrapper of one."""

    @property
    def state(self) -> Any: ...


class FreezeError(MemsaveError, RuntimeError):
    """Rows of B cannot be frozen in the way that the model is wrapped; nothing was changed."""


def due_rows(rank: int, step: int, total_steps: int, freeze_until: float) -> int:
    """How many rows of B are due after `step` of `total_steps`; exact, so that the last one is due on time."""
    span = Fraction(repr(freeze_until)) * total_steps
    return rank if span <= 0 else min(rank, int(Fraction(rank * step) / span))


class LaMDAFreezer:
    """Freezes the rows of B that are due; call `step(optimizer)` after each optimizer step.

    Args:
        model: with LaMDA adapters, wrapped or not.
        total_steps: optimizer steps of the whole training, T.

    Raises ValueError if total_steps is no positive integer, or if the model has no LaMDA layer.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
            raise ValueError(f"LaMDAFreezer: expected total_steps to be a positive integer, got {total_steps!r}")
        if not _layers(model):
            raise ValueError("LaMDAFreezer: the model has no LaMDA layer; make it one by peft.get_peft_model first")
        self.model, self.total_steps, self.steps_done = model, total_steps, 0

    def step(self, optimizer: HasState | None = None) -> int:
        """Count one optimizer step, freeze what is due and pop its state; returns how many segments were frozen.

        Raises FreezeError, changing and counting nothing, under a DistributedDataParallel that waits for all gradients.
        """
        return self.apply(self.steps_done + 1, optimizer)

    def apply(self, step: int, optimizer: HasState | None = None) -> int:
        """As `step`, for the number of steps done so far; what is frozen stays so if that is less than before."""
        self._check_ddp()
        self.steps_done = step
        frozen = [p for layer in _layers(self.model) for p in self._freeze(layer, step)]
        for parameter in frozen if optimizer is not None else ():
            assert optimizer is not None
            optimizer.state.pop(parameter, None)
        return len(frozen)

    def _freeze(self, layer: LaMDALinear, step: int) -> list[Tensor]:
        return [
            parameter
            for name, rank in layer.r.items()
            if name in layer.active_names()
            for parameter in layer.freeze_rows(name, due_rows(rank, step, self.total_steps, layer.freeze_until[name]))
        ]

    def _check_ddp(self) -> None:
        """Before anything is changed, and at the first step rather than at the first one that freezes."""
        layers = _layers(self.model)
        if not any(p.requires_grad for layer in layers for name in layer.r for p in layer.segments(name)):
            return
        found = [m for m in self.model.modules() if isinstance(m, DistributedDataParallel)]
        for ddp in (*found, *(layer.ddp() for layer in layers)):
            if ddp is not None and (not ddp.find_unused_parameters or ddp.static_graph):
                raise FreezeError(
                    "LaMDA freezes rows of B while training runs, and DistributedDataParallel waits for the gradients "
                    "of all parameters that trained when it was made. Make it with find_unused_parameters=True "
                    "(Trainer: ddp_find_unused_parameters=True) and without static_graph, or drop it, freeze, and wrap "
                    "the model again; or train S alone (freeze_until=0). Nothing was changed."
                )

    def state_dict(self) -> dict[str, int]:
        """{"steps_done", "total_steps"}."""
        return {"steps_done": self.steps_done, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, int], optimizer: HasState | None = None) -> None:
        """Go on from `state`: what was due then is frozen at once. Raises ValueError if it is of another length."""
        if state["total_steps"] != self.total_steps:
            raise ValueError(f"LaMDAFreezer: expected a state of {self.total_steps} steps, got {state['total_steps']}")
        self.apply(state["steps_done"], optimizer)


def _layers(model: nn.Module) -> list[LaMDALinear]:
    return [module for module in model.modules() if isinstance(module, LaMDALinear)]


def lamda_param_groups(model: nn.Module, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for an optimizer, of what trains in `model`: B with weight decay 0, all else with `weight_decay`."""
    ids = {id(p) for layer in _layers(model) for name in layer.r for p in layer.segments(name)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in ids], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in ids], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class LaMDACallback(TrainerCallback):
    """Drives the schedule from a transformers Trainer; `Trainer(..., callbacks=[LaMDACallback()])`.

    What was due is frozen again when training resumes from a checkpoint.
    """

    def __init__(self) -> None:
        self._freezer: LaMDAFreezer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self._freezer = LaMDAFreezer(model, state.max_steps)
        self._freezer.apply(state.global_step, kwargs.get("optimizer"))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._freezer is not None:
            self._freezer.apply(state.global_step, kwargs.get("optimizer"))
