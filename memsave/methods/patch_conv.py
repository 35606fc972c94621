"""Convolutional networks in parts: exact inference in a fraction of the activation memory.

Patch-by-patch inference is MCUNetV2's (Lin et al., 2021, arXiv 2110.15352); bands of rows with line buffers compute
nothing twice. Norms over whole maps take two passes, so that slices are exact where Streamlined Inference (Zhan et al.,
2024) is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..config import Guarantee, MethodConfig, Survey
from ..errors import UnsupportedModelError
from ..slicing.dispatcher import Dispatcher
from ..slicing.plan import Plan
from ..slicing.stages import plan_model

SCHEDULES = ("stream", "patch")
_UNCHANGED = "The model was not changed."


@dataclass(frozen=True)
class PatchSurvey(Survey):
    """With what will stand in for the planned module's forward."""

    dispatcher: Dispatcher | None = None


@dataclass(frozen=True, kw_only=True)
class PatchConvConfig(MethodConfig):
    """Inference of a convolutional network in parts, equal to the whole network up to the borders.

    In evaluation and without gradients, calls like the planned one run in bands or tiles where maps are large, and
    whole elsewhere. All other calls run as before. Other image sizes are planned at their first call.

    Args:
        schedule: "stream" runs bands of rows, of which each layer keeps the few that the next band still needs, and
            computes nothing twice. "patch" runs tiles, and computes their overlapping borders again.
        input_size: the shape of the only argument, such as (1, 3, 224, 224); None takes the arguments from
            `convert_model(..., calibration=[batch])`.
        budget_bytes: what a call may allocate at one moment, its inputs and the weights not counted. The plan is the
            cheapest within it. None takes the fewest bytes at no more than 5% extra multiply-accumulates and 25% extra
            estimated time.
        num_patches: bands of the stage, or tiles along each side; None to choose.
        split: the name of the last module that runs in parts; None to choose.

    Raises:
        ValueError: a value outside its range.
    """

    name: ClassVar[str] = "patch_conv"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    docs: ClassVar[str] = "docs/patch_conv.md"

    schedule: str = "stream"
    input_size: Sequence[int] | None = (1, 3, 224, 224)
    budget_bytes: int | None = None
    num_patches: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"PatchConvConfig.schedule: expected one of {list(SCHEDULES)}, got {self.schedule!r}")
        if self.input_size is not None:
            object.__setattr__(self, "input_size", _checked_size(self.input_size))
        for name, least in (("budget_bytes", 1), ("num_patches", 2)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value >= least):
                raise ValueError(
                    f"PatchConvConfig.{name}: expected a whole number of at least {least} or None, got {value!r}"
                )
        if self.split is not None and not (isinstance(self.split, str) and self.split):
            raise ValueError(f"PatchConvConfig.split: expected the name of a module or None, got {self.split!r}")

    @property
    def calibrated(self) -> bool:
        return self.input_size is None

    def why_not(self, module: nn.Module) -> str | None:
        return _replaced(module, "on the instance")

    def survey(
        self, model: nn.Module, targets: Sequence[tuple[str, nn.Module]], calibration: Iterable[Any] | None
    ) -> Survey:
        training = next((name for name, m in model.named_modules() if m.training), None)
        if training is not None:
            where = f"{training} is" if training else "it is"
            raise UnsupportedModelError(
                f"{self}: {where} in training mode, and plans are for inference; call model.eval() first. {_UNCHANGED}"
            )
        settings = {
            "schedule": self.schedule,
            "budget_bytes": self.budget_bytes,
            "parts": self.num_patches,
            "split": self.split,
        }
        try:
            name, dispatcher, plan = plan_model(model, self._call(model, calibration), settings)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self}: {error}. {_UNCHANGED}") from error
        return PatchSurvey(
            converted=[(name, dispatcher.module)],
            notes=[str(plan)],
            states={"": {"modules": [name]}},
            dispatcher=dispatcher,
        )

    def _call(self, model: nn.Module, calibration: Iterable[Any] | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that are planned for: zeros of the input size, or the first batch."""
        if self.input_size is None:
            batch = next(iter(calibration or ()), None)
            if batch is None:
                raise ValueError(f"convert_model: calibration: expected a batch to plan for, got none. {_UNCHANGED}")
            if isinstance(batch, Mapping):
                return (), dict(batch)
            return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        return (torch.empty(tuple(self.input_size), dtype=like.dtype, device=like.device),), {}

    def carry_out(
        self,
        model: nn.Module,
        targets: Sequence[tuple[str, nn.Module]],
        survey: Survey | None,
        calibration: Iterable[Any] | None,
        convert: Callable[[str, Callable[[nn.Module], nn.Module]], None],
    ) -> None:
        assert isinstance(survey, PatchSurvey) and survey.dispatcher is not None
        dispatcher = survey.dispatcher

        def install(root: nn.Module) -> nn.Module:
            dispatcher.module.__dict__["forward"] = dispatcher
            return root

        convert("", install)

    def convert(self, module: nn.Module) -> nn.Module:
        """Plan the whole `module` for the input size, and install the plans."""

        def convert(name: str, how: Callable[[nn.Module], nn.Module]) -> None:
            how(module)

        self.carry_out(module, [], self.survey(module, [], None), None, convert)
        return module

    def within(self, module: nn.Module) -> Sequence[tuple[str, nn.Module]]:
        return [(name, m) for name, m in module.named_modules() if _is_planned(m)]

    def module_state(self, module: nn.Module) -> dict[str, Any]:
        return {"modules": [name for name, _ in self.within(module)]}

    def rebuild(self, module: nn.Module, state: Mapping[str, Any]) -> nn.Module:
        """Each module plans at its first call, for what it is called with then."""
        settings = {"schedule": self.schedule, "budget_bytes": self.budget_bytes, "parts": self.num_patches}
        for name in state["modules"]:
            planned = module.get_submodule(name)
            split = self.split.removeprefix(f"{name}.") if self.split and name else self.split
            planned.__dict__["forward"] = Dispatcher(planned, name, {**settings, "split": split})
        return module

    def why_not_restore(self, module: nn.Module) -> str | None:
        return _replaced(module, "since")

    def restore(self, module: nn.Module, *, adapters: str | None = None) -> nn.Module:
        for _, planned in self.within(module):
            del planned.__dict__["forward"]
        return module

    def backend(self, module: nn.Module) -> str:
        return "in bands" if self.schedule == "stream" else "in tiles"


def patch_plans(model: nn.Module) -> list[Plan]:
    """The plans of a model that `PatchConvConfig` converted: one for each planned module and size of image so far.

    `print` shows a plan as a table, with what ran by it and what did not; see `Plan`.
    """
    dispatchers = [m.__dict__["forward"] for m in model.modules() if _is_planned(m)]
    return [plan for dispatcher in dispatchers for plan in dispatcher.plans.values() if isinstance(plan, Plan)]


def _is_planned(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), Dispatcher)


def _replaced(model: nn.Module, when: str) -> str | None:
    """Say which module has a forward of somebody else's in the instance, or return None."""
    replaced = [n for n, m in model.named_modules() if "forward" in m.__dict__ and not _is_planned(m)]
    return f"the forward of {replaced[0] or 'the model'} was replaced {when}; undo that first" if replaced else None


def _checked_size(size: Any) -> tuple[int, ...]:
    listed = tuple(size) if isinstance(size, (tuple, list, torch.Size)) else ()
    if len(listed) < 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in listed):
        raise ValueError(
            "PatchConvConfig.input_size: expected a shape with batch and channels first, such as (1, 3, 224, 224), or "
            f"None, got {size!r}"
        )
    return listed
