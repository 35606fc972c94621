"""Exactly what a program needs: it is run on fake tensors, and every storage that it makes is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .assembling import Program
from .executor import run
from .lowering import Lowered
from .plainly import running_plainly
from .program import Slots, Step
from .tracing import Traced, once_each


def peak_bytes(program: Program, lowered: Lowered) -> int:
    """The most bytes that one call has allocated at one moment, beside its inputs, parameters and buffers."""
    from ..memory import measure

    program = _shortened(program)
    leaves: dict[int, Any] = {i: node.meta["val"] for i, node in lowered.inputs.items()}
    tensors: dict[str, Tensor] = {name: node.meta["val"] for node, name in lowered.tensors.items()}
    with lowered.mode, torch.no_grad():
        profile = measure(lambda: run(program, _by_place(leaves), tensors))
    return profile.by_category["temporary"]


def plain_peak_bytes(module: nn.Module, traced: Traced, lowered: Lowered, leaves: Sequence[Any]) -> int:
    """The same of the module's own forward, not run by a plan."""
    from ..memory import measure

    fakes = {name: node.meta["val"] for node, name in lowered.tensors.items()}
    given = once_each(module, {**fakes, **_rest(module, fakes, lowered)})
    called = [lowered.inputs[i].meta["val"] if i in lowered.inputs else leaf for i, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(called, traced.in_spec)
    with lowered.mode, torch.no_grad(), running_plainly():
        profile = measure(lambda: torch.func.functional_call(module, given, args, kwargs, tie_weights=False))
    return profile.by_category["temporary"]


def _rest(module: nn.Module, fakes: dict[str, Tensor], lowered: Lowered) -> dict[str, Tensor]:
    """Twins of the parameters and buffers that the graph does not read."""
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    with lowered.mode:
        return {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
            for name, t in held.items()
            if name not in fakes
        }


def _by_place(leaves: dict[int, Any]) -> list[Any]:
    return [leaves.get(i) for i in range(max(leaves, default=-1) + 1)]


def _shortened(program: Program) -> Program:
    """The program without the parts that do to memory what the part before them did."""
    skipped = {i for start, stop in program.repeats for i in range(start, stop)}
    # What a skipped step frees last is still freed: whole values die with the last step of a pass.
    steps = [Step(_nothing, 0, step.frees) if i in skipped else step for i, step in enumerate(program.steps)]
    return replace(program, steps=steps)


def _nothing(slots: Slots) -> None:
    return None
