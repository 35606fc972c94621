"""Which module of a model gets a plan: the smallest around what is worth computing in parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import UnsupportedModelError
from ..memory import measure
from .assembling import Stretch
from .choosing import choose_stretches
from .dispatcher import Dispatcher
from .errors import CannotTrace
from .estimating import Estimator
from .lowering import Lowered, lower
from .plainly import running_plainly, untouched
from .plan import Plan
from .tracing import is_within, module_of, once_each, trace

SLACK = 1.05
Call = tuple[tuple[Any, ...], dict[str, Any]]


def plan_model(model: nn.Module, call: Call, settings: Mapping[str, Any]) -> tuple[str, Dispatcher, Plan]:
    """The module to be planned: its name, what stands in for its forward, and the plan for this call.

    Changes nothing. All of the model is in evaluation.

    Raises:
        UnsupportedModelError: the model cannot be traced, or nothing in it is worth it, or the budget cannot be met.
    """
    with untouched(model):
        name, peak = _smallest_module(model, call, settings)
        while True:
            made = _plan_module(model, name, call, settings)
            # What is outside runs as it stands. Where that needs more than a plan of all, the plan takes it in.
            if made is not None:
                most = settings.get("budget_bytes") or SLACK * max(peak, made[2].peak_bytes)
                if not name or _call_bytes(model, made[1], call) <= most:
                    return made
            name = _usable(model, name.rpartition(".")[0])


def _plan_module(
    model: nn.Module, name: str, call: Call, settings: Mapping[str, Any]
) -> tuple[str, Dispatcher, Plan] | None:
    """The plan of one module within, or None if it cannot have one of its own."""
    module = model.get_submodule(name)
    calls = _calls_of(model, module, call) if name else [call]
    if len(calls) != 1:
        return None
    args, kwargs = calls[0]
    settings = dict(settings)
    if name and settings.get("split") is not None:
        settings["split"] = str(settings["split"]).removeprefix(f"{name}.")
    dispatcher = Dispatcher(module, name, settings)
    try:
        plan = dispatcher.plan_for(args, kwargs)
    except (CannotTrace, UnsupportedModelError) as error:
        if name:  # what a module around it needs may be another
            return None
        raise UnsupportedModelError(str(error)) from error
    budget_bytes = settings.get("budget_bytes")
    wished = settings.get("parts") or settings.get("split")
    if plan.is_sliced and (wished or plan.peak_bytes < plan.plain_peak_bytes):
        return name, dispatcher, plan
    if budget_bytes is not None and plan.plain_peak_bytes > budget_bytes:
        return name, dispatcher, plan
    if name:
        return None
    if budget_bytes is None:
        raise UnsupportedModelError(_nothing(plan.ends))
    raise UnsupportedModelError(f"a call needs {plan.plain_peak_bytes:,} bytes as it is, which is within budget_bytes")


def _nothing(ends: Mapping[str, str]) -> str:
    why = next((f"{where}: {reason}" for where, reason in ends.items()), "")
    return (
        "nothing in it needs less memory when it is computed part by part, within the allowed extra work"
        f"{f' ({why})' if why else ''}"
    )


def _smallest_module(model: nn.Module, call: Call, settings: Mapping[str, Any]) -> tuple[str, int]:
    """The name of the smallest module that holds all that is to be computed in parts; the peak of a plan of all."""
    args, kwargs = call
    try:
        lowered = lower(trace(model, args, kwargs), model, pytree.tree_leaves((args, dict(kwargs))))
    except CannotTrace as error:
        raise UnsupportedModelError(str(error)) from error
    stretches, planner = choose_stretches(lowered, settings)
    sliced = [stretch.nodes(lowered) for stretch in stretches if stretch.rules is not None]
    if not sliced:
        if settings.get("budget_bytes") is None:
            raise UnsupportedModelError(_nothing(planner.ends()))
        return "", 0  # by estimates it needs no parts; what is exact is seen later
    name = module_of(sliced[0][0])
    for nodes in sliced:
        for node in (nodes[0], nodes[-1]):
            name = _common(name, module_of(node))
    peak = max(_peak(stretch, planner.estimator) for stretch in stretches)
    while name and _most_outside(name, lowered, planner.estimator) > peak:
        name = name.rpartition(".")[0]
    return _usable(model, name), peak


def _peak(stretch: Stretch, estimator: Estimator) -> int:
    cost = estimator.of(stretch)
    return cost.peak_bytes if cost is not None else 0


def _most_outside(name: str, lowered: Lowered, estimator: Estimator) -> int:
    """The most bytes while an op outside of the module `name` runs as it stands."""
    outside = (i for i, node in enumerate(lowered.nodes) if not is_within(module_of(node), name))
    return max((estimator.whole(i, i + 1, in_place=False).peak_bytes for i in outside), default=0)


def _common(first: str, last: str) -> str:
    """The smallest module around two."""
    shared = []
    for a, b in zip(first.split("."), last.split("."), strict=False):
        if a != b:
            break
        shared.append(a)
    return ".".join(shared)


def _usable(model: nn.Module, name: str) -> str:
    """The module `name`, or the smallest around it whose forward may be replaced.

    A leaf or a list has no forward worth it; transformers' checkpointed layers lose their checkpointing by it.
    """
    while name:
        module = model.get_submodule(name)
        lists = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        checkpointed = any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(module).__mro__)
        if not lists and not checkpointed and any(True for _ in module.children()):
            return name
        name = name.rpartition(".")[0]
    return ""


def _calls_of(model: nn.Module, module: nn.Module, call: Call) -> list[Call]:
    """What `module` is called with when `model` is called with `call`: fake tensors."""
    calls: list[Call] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with running_plainly():
            _call_fakes(model, call, lambda run: run())
    except Exception:  # it could be traced, if not run: then it is planned as a whole
        return []
    finally:
        hook.remove()
    return calls


def _call_bytes(model: nn.Module, dispatcher: Dispatcher, call: Call) -> int:
    """The most that a call of `model` allocates while `dispatcher` stands in for its module's forward."""
    dispatcher.module.__dict__["forward"] = dispatcher
    try:
        profile = _call_fakes(model, call, measure)
    finally:
        del dispatcher.module.__dict__["forward"]
        dispatcher.calls.clear()
    return int(profile.by_category["temporary"])


def _call_fakes(model: nn.Module, call: Call, how: Callable[[Callable[[], Any]], Any]) -> Any:
    """`how(run)`, where `run()` calls `model` on fake twins of its tensors and of the arguments."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        twins = {id(t): _fake(t) for t in held.values()}
        fakes = once_each(model, {name: twins[id(t)] for name, t in held.items()})
        args, kwargs = pytree.tree_map_only(Tensor, _fake, call)
        return how(lambda: torch.func.functional_call(model, fakes, args, kwargs, tie_weights=False))


def _fake(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
