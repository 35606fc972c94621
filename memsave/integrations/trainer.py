"""memsave in transformers' Trainer: converts, measures a step, and does what some methods ask of a training loop."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..config import Guarantee, MethodConfig, applied_configs
from ..convert import convert_model
from ..errors import UnsupportedModelError
from ..nn.routed_ffn import RoutedFFN, set_balance_scale
from ..report import Report
from .checkpoints import save_by_memsave
from .training_step import StepMemory, StepMeter

_UNCHANGED = "The model was not changed."
_LAMDA = "memsave.integrations.peft.lamda"


class MemsaveCallback(TrainerCallback):
    """Converts the model of a Trainer before its optimizer exists: `Trainer(..., callbacks=[MemsaveCallback()])`.

    Besides, it measures one training step, drives LaMDA's schedule, tells routed feed-forward blocks by what the
    Trainer multiplies its loss (accumulated batches, a gradient scaler), logs their loads, and lets checkpoints hold
    what the Trainer needs to go on from them, bit for bit. Checkpoints of models whose keys a method changed, and of
    adapters that `convert` put in, are those of `memsave.save`, which `memsave.load` reads, too.

    Args:
        convert: None or True for `convert_model(model)`; a config; or several, in their order, where True stands for a
            bare conversion: `[memsave.LaMDAConfig(...), True]`. False converts nothing.
        report: whether the main process prints what was converted, and what was measured.
        calibration: batches for methods that look at data, as `convert_model` takes them.
        measure_step: which optimizer step of a `train()` is measured, from 1 on; the states of most optimizers exist
            from 2 on. That step is slower. None measures nothing, as under torch_compile.

    Attributes:
        conversions: the reports of `convert_model`, in order.
        memory: what was measured, a `StepMemory`; None before.

    Raises:
        ValueError: an argument of another kind.
        MemsaveError: in `Trainer(...)`, what `convert_model` raises; or the optimizer was made before, and `convert`
            gives the model other parameters. In `train()`, if the callback was added afterwards by `add_callback` or
            the model was made by `model_init`, and it can be converted no more. The model was not changed.
    """

    def __init__(
        self,
        convert: MethodConfig | bool | Sequence[MethodConfig | bool | None] | None = None,
        *,
        report: bool = True,
        calibration: Iterable[Any] | None = None,
        measure_step: int | None = 2,
    ) -> None:
        whole = isinstance(measure_step, int) and not isinstance(measure_step, bool) and measure_step >= 1
        if not (measure_step is None or whole):
            raise ValueError(f"MemsaveCallback: measure_step: expected a whole number from 1 on, got {measure_step!r}")
        self.calls = list(_calls(convert))
        if calibration is not None and not any(map(_calibrated, self.calls)):
            raise ValueError("MemsaveCallback: calibration was given, but nothing in convert looks at it")
        self.report = report
        self.calibration = calibration
        self.measure_step = measure_step
        self.conversions: list[Report] = []
        self.memory: StepMemory | None = None
        self._converted: weakref.ref[nn.Module] | None = None
        self._meter = StepMeter()
        self._lamda: TrainerCallback | None = None
        self._steps_done = 0
        self._steps_of_epoch = 0

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Convert the model, unless an optimizer would miss what the conversion makes."""
        StepMeter.end_all()
        if kwargs.get("optimizer") is not None:
            self._refuse_new_parameters(model, "the Trainer was given an optimizer, made before the model is converted")
        if args.save_strategy != "no":
            self._refuse_unsaved(model)
        self._convert(model, state)

    def _convert(self, model: nn.Module, state: Any) -> None:
        for configs in self.calls:
            calibration = self.calibration if _calibrated(configs) else None
            self.conversions.append(convert_model(model, configs, calibration=calibration))
        self._converted = weakref.ref(model)
        if self.report and state.is_world_process_zero:
            print(*self.conversions[len(self.conversions) - len(self.calls) :], *_forgotten(model), sep="\n")

    def _refuse_new_parameters(self, model: nn.Module, why: str) -> None:
        """Raise if a conversion that is still to be made gives the model parameters that no optimizer has."""
        guarantees = (Guarantee.APPROXIMATE, Guarantee.ADAPTER)
        for configs in self.calls:
            lossy = [c for c in map(_as_method, configs or ()) if c.guarantee in guarantees]
            if lossy and not _is_converted(model, lossy):
                raise UnsupportedModelError(
                    f"MemsaveCallback: {why}, and {lossy[0]} may give the model parameters that it would not train. "
                    f"{_ADVICE} {_UNCHANGED}"
                )

    def _refuse_unsaved(self, model: nn.Module) -> None:
        """Raise if what the conversion makes would be in no checkpoint."""
        changing = [c for configs in self.calls for c in map(_as_method, configs or ()) if c.changes_keys]
        if changing and _is_peft_model(model) and not _is_converted(model, changing):
            raise UnsupportedModelError(
                f"MemsaveCallback: the model is a PeftModel, whose checkpoints hold its adapters alone, and not what "
                f"{changing[0]} makes of the base model. Convert the base model, keep it by memsave.save, and give it "
                f"to get_peft_model afterwards; or train with save_strategy='no'. {_UNCHANGED}"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Convert what was not converted in time, where that is right; follow the schedule to where training starts."""
        StepMeter.end_all()
        converted = self._converted() if self._converted is not None else None
        if all(module is not converted for module in model.modules()):
            self._convert_late(args, state, model)
        save_by_memsave(model)
        self._steps_done = 0
        if _LAMDA in sys.modules:  # or there is no LaMDA layer
            lamda: Any = sys.modules[_LAMDA]
            found = any(isinstance(module, lamda.LaMDALinear) for module in model.modules())
            self._lamda = lamda.LaMDACallback() if found else None
        if self._lamda is not None:
            self._lamda.on_train_begin(args, state, control, model=model, **kwargs)

    def _convert_late(self, args: Any, state: Any, model: nn.Module) -> None:
        """Parameters that stay the same objects are still the optimizer's; a graph is compiled at the first step."""
        why = "it was added by add_callback, or the model was made by model_init, so the optimizer exists already"
        self._refuse_new_parameters(model, why)
        changes = any(convert_model(model, configs, dry_run=True).count for configs in self.calls)
        if changes and (args.world_size > 1 or args.n_gpu > 1):
            raise UnsupportedModelError(f"MemsaveCallback: {why}, and the model is wrapped. {_ADVICE} {_UNCHANGED}")
        self._convert(model, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps of the epoch, also where training resumes within one."""
        length = _length(kwargs.get("train_dataloader"))
        steps = -(-length // args.gradient_accumulation_steps) if length else 0
        self._steps_of_epoch = state.global_step % steps if steps and not args.ignore_data_skip else 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Scale the balance losses as the Trainer scales its loss, and start to measure if it is time."""
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        set_balance_scale(model, scale / self._batches(args, kwargs.get("train_dataloader")))
        wanted = self.measure_step == self._steps_done + 1 and not args.torch_compile
        if wanted and state.is_world_process_zero:
            self._meter.start()

    def _batches(self, args: Any, dataloader: Any) -> int:
        """How many batches the step accumulates; the last step of an epoch may have fewer."""
        batches: int = args.gradient_accumulation_steps
        length = _length(dataloader)
        rest = length - self._steps_of_epoch * batches
        return rest if 0 < rest < batches else batches

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark where the optimizer's step begins."""
        self._meter.mark()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark where the optimizer's step has ended."""
        self._meter.mark()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Follow the schedule; tell what was measured."""
        self._steps_done += 1
        self._steps_of_epoch += 1
        memory = self._meter.stop(state.global_step)
        if memory is not None:
            self.memory = memory
            state.log_history.append({**memory.to_log(), "epoch": state.epoch, "step": state.global_step})
            if self.report:
                print(memory)
        if self._lamda is not None:
            self._lamda.on_step_end(args, state, control, model=model, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: Any = None, **kwargs: Any) -> None:
        """Add the loads of routed feed-forward blocks to the logs of training."""
        if logs is not None and "loss" in logs and (loads := routed_loads(model)):
            logs.update(loads)
            state.log_history[-1].update(loads)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Leave the model as a loop of one's own expects it."""
        self._meter.abandon()
        set_balance_scale(model, 1.0)


_ADVICE = (
    "Give the callback to the Trainer when it is made, Trainer(..., callbacks=[MemsaveCallback(...)]), without an "
    "optimizer of your own; or call memsave.convert_model(model, ...) before the optimizer and the Trainer are made "
    "(within model_init, if there is one)."
)


def routed_loads(model: nn.Module) -> dict[str, float]:
    """Of the latest forward of all routed blocks: the largest and the least load, and the mean balance loss.

    A load of 1 is that of a block that serves as many tokens as the others. Empty without routed blocks.
    """
    noted = [m for m in model.modules() if isinstance(m, RoutedFFN) and m.load is not None]
    if not noted:
        return {}
    loads = [share * len(m.load) for m in noted if m.load is not None for share in m.load.tolist()]
    losses = [float(m.balance_loss) for m in noted if m.balance_loss is not None]
    return {
        "routed_ffn_load_max": max(loads),
        "routed_ffn_load_min": min(loads),
        "routed_ffn_balance_loss": sum(losses) / len(losses),
    }


def _calls(convert: Any) -> Iterator[list[Any] | None]:
    """What each call of `convert_model` gets: None for a bare one, or configs that follow on each other."""
    if convert is False:
        return
    if isinstance(convert, (str, MethodConfig, type)) or not isinstance(convert, Sequence):
        convert = [convert]
    configs: list[Any] = []
    for item in convert:
        if item is False:
            raise ValueError("MemsaveCallback: convert: expected configs, or True for a bare conversion, got [False]")
        if item is None or item is True:
            if configs:
                yield configs
            configs = []
            yield None
        else:
            configs.append(item)
    if configs:
        yield configs


def _as_method(config: Any) -> MethodConfig:
    """A config of PEFT's kind as the method that it stands for."""
    return config.as_method() if hasattr(config, "as_method") else config


def _calibrated(configs: Sequence[Any] | None) -> bool:
    return any(getattr(config, "calibrated", False) for config in configs or ())


def _is_converted(model: nn.Module, configs: Sequence[MethodConfig]) -> bool:
    """Whether each of `configs` was applied to something in `model` before."""
    applied = [config for module in model.modules() for config in applied_configs(module).values()]
    return all(config in applied for config in configs)


def _is_peft_model(model: nn.Module) -> bool:
    return any(cls.__name__ == "PeftModel" for cls in type(model).__mro__)


def _length(dataloader: Any) -> int:
    """Batches of an epoch; 0 if nobody knows."""
    try:
        return len(dataloader)
    except TypeError:
        return 0


def _forgotten(model: nn.Module) -> list[str]:
    """What a checkpoint does not hold, in words."""
    configs = (config for module in model.modules() for config in applied_configs(module).values())
    if any(getattr(c, "grad_norms", "none") != "none" and not getattr(c, "save_grad_norms", True) for c in configs):
        return ["gradient norms are remembered, but not in checkpoints; WTACRSConfig(save_grad_norms=True) writes them"]
    return []
