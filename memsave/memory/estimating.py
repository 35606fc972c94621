"""Predicting a training step: it runs on fake tensors, which have sizes but no bytes."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import EstimateError, UnsupportedModelError
from ..wrappers import wrapping
from .fake import Fakes
from .profile import MemoryProfile
from .replay import build_profile
from .storages import tensors_in
from .tracker import StorageTracker

MakeOptimizer = Callable[[list[nn.Parameter]], Optimizer]
_HINT = "Nothing was changed."


def estimate(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple[Any, ...] | list[Any] | Tensor,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    optimizer: str | MakeOptimizer | None = None,
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> MemoryProfile:
    """Predict the memory of one training step, without running it: forward, backward and optimizer on fake tensors.

    The step is a steady one: no gradients at its start, optimizer states made by a step before, gradients dropped at
    its end. Nothing is allocated but Python objects, and `model`, its gradients, its mode and the random numbers of
    torch, numpy and Python stay as they are: a copy runs, whose tensors are fake. The prediction is what
    `memsave.measure` gives for the same step on the same device and torch, within 1%; docs/estimate.md has exceptions.

    Args:
        model: converted or not, with PEFT adapters, frozen or tied parameters, or on the meta device; not wrapped (DDP,
            FSDP) or compiled. If it is in eval mode, its copy is put in training mode as a whole.
        batch: what the model is called with: a mapping (keyword arguments), a tuple or list (arguments) or one tensor.
            Values of small integer and boolean tensors are read, as ones on the meta device; no others are.
        loss: maps the model's output to a scalar. None takes the output's `.loss` (or `["loss"]`), or else the sum of
            its first tensor that needs a gradient.
        optimizer: the name of a class in `torch.optim` ("AdamW", "sgd", ...), with its default settings, or a function
            that makes one from a list of parameters (those that need gradients). None leaves the optimizer's step out.
        autocast: dtype of `torch.autocast` around the forward and the loss; None for no autocast.
        device: where the step would run. None means where the tensors are, and for those on the meta device CUDA where
            torch sees it, else the CPU.

    Returns:
        The profile, as `memsave.measure` gives it; without `allocator_peak_bytes`.

    Raises:
        TypeError: an argument of another type.
        UnsupportedModelError: the model is wrapped.
        ValueError: an unknown name of an optimizer.
        EstimateError: the model does not take the batch, branches on values that fake tensors do not have, or cannot be
            copied; or `loss` or `optimizer` fails. The model is unchanged.
    """
    return Step(model, batch, loss, optimizer, autocast, device).profile()


def estimate_change(
    model: nn.Module, batch: Any, change: Callable[[nn.Module], object]
) -> tuple[MemoryProfile, MemoryProfile]:
    """`estimate(model, batch)`, and the same after `change` was applied to the fake copy; `model` stays as it is."""
    step = Step(model, batch, None, None, None, None)
    return step.profile(), step.profile(change)


class Step:
    """A training step on fake tensors; the arguments are those of `estimate`."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss: Callable[[Any], Tensor] | None,
        optimizer: str | MakeOptimizer | None,
        autocast: torch.dtype | None,
        device: str | torch.device | None,
    ) -> None:
        _check_types(model, batch, loss, optimizer, autocast)
        self.model, self.batch, self.autocast = model, batch, autocast
        self.loss = loss or _default_loss
        self.make_optimizer = _optimizer_named(optimizer) if isinstance(optimizer, str) else optimizer
        self.device = None if device is None else _usable(device)

    def profile(self, change: Callable[[nn.Module], object] | None = None) -> MemoryProfile:
        """Run the step on a fresh copy of the model, after `change`."""
        tracker = StorageTracker()
        self.run(tracker, change)
        return build_profile(tracker.existing, tracker.events, None, tracker.recomputed)

    def run(self, tracker: StorageTracker, change: Callable[[nn.Module], object] | None = None) -> nn.Module:
        """Run the step on a fresh copy of the model, after `change`, within `tracker`; return the copy."""
        fakes = Fakes(self.device, lambda: tracker.running_module)
        with ExitStack() as contexts:
            contexts.enter_context(_same_random_numbers())
            contexts.enter_context(_without_callers_modes())
            contexts.enter_context(_quiet())
            copy = fakes.module(self.model)
            if not copy.training:
                copy.train()
            arguments, keywords = fakes.batch(_call(self.batch))
            contexts.enter_context(fakes.mode)
            contexts.enter_context(fakes.integers)
            if change is not None:
                change(copy)
            parameters = [p for p in copy.parameters() if p.requires_grad]
            optimizer = self._optimizer(parameters)
            with tracker:
                loss = self._loss_of(copy, arguments, keywords)
                with _explained(f"the backward of {type(copy).__name__} fails"):
                    loss.backward()
                del loss
                if optimizer is not None:
                    with _explained(f"the step of {type(optimizer).__name__} fails"):
                        with tracker.paused():
                            optimizer.step()  # makes the states, which a steady step has from its start
                        optimizer.step()
                for parameter in parameters:
                    parameter.grad = None
        return copy

    def _loss_of(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
        with self._autocast([*tensors_in([arguments, keywords]), *model.parameters()]):
            with _explained(f"{type(model).__name__} fails on this batch ({_described(self.batch)})"):
                output = model(*arguments, **keywords)
            with _explained(f"loss fails on the model's output ({_kind(output)})"):
                loss = self.loss(output)
        torch.clear_autocast_cache()  # leaving autocast does that, but not within an autocast of the caller
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _kind(loss)
            why = " that needs no gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
            raise EstimateError(f"estimate: loss: expected a scalar tensor with a gradient, got {got}{why}. {_HINT}")
        return loss

    def _autocast(self, tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        device = next((tensor.device.type for tensor in tensors), "cpu")
        return torch.autocast(device, self.autocast)

    def _optimizer(self, parameters: list[nn.Parameter]) -> Optimizer | None:
        if self.make_optimizer is None or not parameters:
            return None
        with _explained(f"optimizer fails for the {len(parameters)} parameters that need gradients"):
            optimizer = self.make_optimizer(parameters)
        if not isinstance(optimizer, Optimizer):
            raise EstimateError(
                f"estimate: optimizer: expected a function that returns a torch.optim.Optimizer, and it returned "
                f"{type(optimizer).__name__}. {_HINT}"
            )
        for group in optimizer.param_groups:
            # torch prefers foreach on accelerators, but does not recognize fake parameters as plain ones.
            unset = not any(group.get(name, True) for name in ("foreach", "fused", "differentiable"))
            if unset and group["foreach"] is None and parameters[0].device.type != "cpu":
                group["foreach"] = True
        return optimizer


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Errors in the block say what failed."""
    try:
        yield
    except EstimateError:
        raise
    except Exception as error:
        raise EstimateError(f"estimate: {what}: {type(error).__name__}: {str(error).rstrip('.')}. {_HINT}") from error


def _check_types(model: object, batch: object, loss: object, optimizer: object, autocast: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"estimate: expected a torch.nn.Module, got {type(model).__name__}")
    if reason := wrapping(model):
        raise UnsupportedModelError(f"estimate: {reason}. {_HINT}")
    if not isinstance(batch, (Mapping, tuple, list, Tensor)):
        raise TypeError(
            f"estimate: batch: expected a mapping (keyword arguments), a tuple (arguments) or a tensor, "
            f"got {type(batch).__name__}"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"estimate: loss: expected a function of the model's output, got {type(loss).__name__}")
    if optimizer is not None and not isinstance(optimizer, str) and not callable(optimizer):
        raise TypeError(
            "estimate: optimizer: expected a name such as 'adamw', or a function that makes an optimizer from a list "
            f"of parameters, such as lambda p: torch.optim.AdamW(p, lr=1e-4), got {_kind(optimizer)}"
        )
    if autocast is not None and not (isinstance(autocast, torch.dtype) and autocast.is_floating_point):
        raise TypeError(f"estimate: autocast: expected a floating dtype such as torch.bfloat16, got {autocast!r}")


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """The random numbers after the block are those from before it: a small random tensor in it is real."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextmanager
def _without_callers_modes() -> Iterator[None]:
    """The step is the same in whatever mode the caller is: no_grad, autocast, fake tensors, anomaly detection."""
    with ExitStack() as contexts:
        contexts.enter_context(_disable_current_modes())
        contexts.enter_context(torch.inference_mode(False))
        contexts.enter_context(torch.enable_grad())
        contexts.enter_context(torch.autograd.set_detect_anomaly(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs the errors of fake kernels, which are raised as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _usable(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"estimate: device {str(device)!r} cannot be used on this machine: {error}") from None
    return found


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments and keyword arguments that a batch stands for."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _described(batch: Any) -> str:
    def one(value: object) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return type(value).__name__

    arguments, keywords = _call(batch)
    return ", ".join([*map(one, arguments), *(f"{name}: {one(value)}" for name, value in keywords.items())])


def _kind(output: object) -> str:
    return "Tensor" if isinstance(output, Tensor) else type(output).__name__


def _default_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is not None:
        return loss
    values = output.values() if isinstance(output, Mapping) else output
    for tensor in tensors_in(list(values) if not isinstance(values, (Tensor, list, tuple, dict)) else values):
        if tensor.requires_grad:
            return tensor.sum()
    raise EstimateError(
        f"estimate: the model's output ({_kind(output)}) has no .loss and no tensor that needs a gradient; "
        f"give loss=, a function of the output, or check that parameters are trainable. {_HINT}"
    )


def _optimizer_named(name: str) -> MakeOptimizer:
    classes = {
        cls.__name__.lower(): cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    if name.lower() not in classes:
        known = ", ".join(sorted(cls.__name__ for cls in classes.values()))
        raise ValueError(f"estimate: optimizer {name!r} is unknown; expected one of {known}, or a function")
    return classes[name.lower()]
