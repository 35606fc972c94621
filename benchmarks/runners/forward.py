"""Measures forward without gradients: the output checked first, then the temporary bytes, then times in turns."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from benchmarks.cases.training import ForwardCase
from benchmarks.cases.variants import Variant
from benchmarks.checks import check_exact

from .timing import elapsed, in_turns, no_garbage_collection, summary


class Forward:
    """One variant, ready to run on random tokens (B, T)."""

    def __init__(self, case: ForwardCase, variant: Variant, device: str, dtype: torch.dtype | None = None) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = case.model()
        self.model: nn.Module = model.to(device, case.dtype).to(dtype or case.dtype).eval()
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(model.config.vocab_size, case.shape, generator=generator).to(device)
        variant.apply(self.model)
        self.forward_of = case.forward

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.forward_of(self.model, self.tokens)

    def outputs(self) -> dict[str, Tensor]:
        """In fp64, for the check."""
        return {"output": self.run().double()}


def run_forward_case(case: ForwardCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each variant: `temporary_bytes`, the peak of what is live beyond model and input; times; `error`.

    Raises:
        CheckFailed: a variant computes something else than the plain model.
    """
    errors = checked(case, device)
    forwards = [Forward(case, variant, device) for variant in case.variants]
    figures = []
    for variant, forward in zip(case.variants, forwards, strict=True):
        forward.run()
        profile = memsave.measure(forward.run)
        temporary_bytes = profile.peak_bytes - profile.baseline_bytes
        figures.append({"variant": variant.name, "temporary_bytes": temporary_bytes, "error": errors[variant.name]})
    times: list[list[tuple[float, float]]] = [[] for _ in forwards]
    with no_garbage_collection():
        for index in in_turns(len(forwards), rounds):
            times[index].append(elapsed(forwards[index].run, 1, device))
    return [f | asdict(summary(t)) for f, t in zip(figures, times, strict=True)], {}


def checked(case: ForwardCase, device: str) -> dict[str, float]:
    """By variant: the error of its outputs over that of the plain model."""
    case = replace(case, **case.gate)
    plain = case.variants[0]
    truth, expected = (Forward(case, plain, device, dtype).outputs() for dtype in (torch.float64, None))
    return {
        variant.name: check_exact(
            variant.name, Forward(case, variant, device).outputs(), expected, truth, set(), case.dtype
        )
        for variant in case.variants
    }
