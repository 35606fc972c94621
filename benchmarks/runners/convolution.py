"""Measures convolutional networks without gradients: outputs and plans checked first, then bytes, work and times."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import memsave
from benchmarks.cases.convolution import ConvolutionCase, Way
from benchmarks.checks import CheckFailed

from .timing import elapsed, in_turns, no_garbage_collection, summary

TOLERANCE = 1e-5  # of the largest output: the order of sums differs, also within the plain model
_PLANNED = {"planned"}


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The CPU's fused attention, which torch does not count.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class Inference:
    """One way, ready to run.

    Raises:
        UnsupportedModelError: memsave has no plan for it, or none within the way's budget.
    """

    def __init__(self, case: ConvolutionCase, way: Way, plain: nn.Module, image: Tensor, budget: int | None) -> None:
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        self.way, self.forward = way, case.forward
        self.model = copy.deepcopy(plain)
        if way.channels_last:
            self.model = self.model.to(memory_format=layout)
        self.image = image.contiguous(memory_format=layout)
        way.prepare(self.model)
        # What a module within the model is called with was made for it.
        self.held_bytes = math.prod(case.shape) * image.element_size() if case.planned else 0
        self.budget: int | None = None
        if way.settings is not None:
            planned = self.model.get_submodule(case.planned)
            self.budget = convert(planned, case.shape, way, budget and budget - self.held_bytes)

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.forward(self.model, self.image)

    def figures(self) -> tuple[Tensor, dict[str, Any]]:
        """The output, and `peak_bytes` that a call allocates, `predicted_bytes` by its plan if it has one, `macs`.

        Raises:
            CheckFailed: calls did not run by the plan, or allocate something else than it and the budget say.
        """
        outputs: list[Tensor] = []
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            profile = memsave.measure(lambda: outputs.append(self.run()))
        found: dict[str, Any] = {"peak_bytes": profile.by_category["temporary"], "predicted_bytes": None}
        found["macs"] = counter.get_total_flops() // 2
        if self.way.settings is not None:
            (plan,) = memsave.patch_plans(self.model)
            found["predicted_bytes"] = plan.peak_bytes + self.held_bytes
            self.check(plan, found["peak_bytes"], found["predicted_bytes"])
        return outputs[0], found

    def check(self, plan: Any, peak_bytes: int, predicted_bytes: int) -> None:
        if set(plan.calls) != _PLANNED:
            raise CheckFailed(f"{self.way.name}: its calls did not run by the plan: {dict(plan.calls)}")
        allocates = f"{self.way.name}: a call allocates {peak_bytes:,} bytes"
        # Of a plan for a module within, what is around it may need more.
        if peak_bytes != predicted_bytes and (peak_bytes < predicted_bytes or not plan.module):
            raise CheckFailed(f"{allocates}, predicted were {predicted_bytes:,}")
        if self.budget is not None and peak_bytes - self.held_bytes > self.budget:
            raise CheckFailed(f"{allocates}, its budget is {self.budget + self.held_bytes:,}")


def run_convolution_case(
    case: ConvolutionCase, device: str, rounds: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each way its `figures`, times, and `difference`: the largest from the first way's output, over its largest.

    Raises:
        CheckFailed: an exact way computes something else, or memsave something else than it planned.
        PackageMissing: the model needs a package that is not installed.
    """
    torch.manual_seed(0)
    plain = case.model().to(device).eval()
    image = torch.randn(case.shape, generator=torch.Generator().manual_seed(1)).to(device)
    # On a GPU in full precision, in which the outputs can be compared.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ready, figures, left_out = _checked(case, plain, image)
        times: list[list[tuple[float, float]]] = [[] for _ in ready]
        with no_garbage_collection():
            for index in in_turns(len(ready), min(rounds, case.most_rounds)):
                times[index].append(elapsed(ready[index].run, 1, device))
    return [figures[r.way.name] | asdict(summary(t)) for r, t in zip(ready, times, strict=True)], left_out


def _checked(
    case: ConvolutionCase, plain: nn.Module, image: Tensor
) -> tuple[list[Inference], dict[str, dict[str, Any]], dict[str, str]]:
    """Every way that there is, its figures without times, and why others are left out."""
    ready: list[Inference] = []
    figures: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    expected = None
    for way in case.ways:
        try:
            inference = Inference(case, way, plain, image, budget_of(way, figures))
        except memsave.UnsupportedModelError as error:
            left_out[way.name] = str(error)
            continue
        output, measured = inference.figures()
        expected = output if expected is None else expected
        difference = float((output - expected).abs().max() / expected.abs().max())
        if way.exact and not difference <= TOLERANCE:
            _check_beside_truth(case, way.name, plain, image, output, expected)
        figures[way.name] = {"way": way.name, "difference": difference} | measured
        ready.append(inference)
    return ready, figures, left_out


@torch.no_grad()
def _check_beside_truth(
    case: ConvolutionCase, name: str, plain: nn.Module, image: Tensor, output: Tensor, expected: Tensor
) -> None:
    """Let an output pass that is as near to fp64's as the plain model's own: that one's sums round, too."""
    truth = case.forward(copy.deepcopy(plain).double(), image.double())
    largest = truth.abs().max()
    error, plains = (float((y - truth).abs().max() / largest) for y in (output, expected))
    if not error <= max(TOLERANCE, 2 * plains):
        raise CheckFailed(f"{name}: its output is off by {error:.1e} of the largest, the plain model's by {plains:.1e}")


def budget_of(way: Way, figures: Mapping[str, Mapping[str, Any]]) -> int | None:
    """The bytes of the way that `way` names, if it names one."""
    return figures[way.budget]["peak_bytes"] if way.budget in figures else None


def convert(module: nn.Module, shape: tuple[int, ...], way: Way, budget: int | None) -> int | None:
    """Let memsave run `module` by a plan; its budget, if it has one."""
    assert way.settings is not None
    settings: dict[str, Any] = {"input_size": shape, **way.settings}
    if way.budget is not None:
        settings["budget_bytes"] = smallest_budget(module, settings) if way.budget == "smallest" else budget
    memsave.convert_model(module, memsave.PatchConvConfig(**settings))
    return settings.get("budget_bytes")


def smallest_budget(module: nn.Module, settings: Mapping[str, Any]) -> int:
    """The fewest bytes that there is a plan for: what the refusal of a single byte names."""
    try:
        memsave.convert_model(module, memsave.PatchConvConfig(**settings, budget_bytes=1))
    except memsave.UnsupportedModelError as error:
        if least := re.search(r"expected at least ([\d,]+)", str(error)):
            return int(least[1].replace(",", ""))
        raise
    raise AssertionError("no plan allocates a single byte")
