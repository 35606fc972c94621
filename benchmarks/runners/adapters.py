"""Measures adapter cases: gradients against finite differences in fp64 first, then bytes, then times in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from benchmarks.cases.adapters import AdapterCase, AdapterVariant
from benchmarks.cases.variants import enable_checkpointing
from benchmarks.checks import CheckFailed

from .models import STEPS_PER_TURN, release
from .timing import elapsed, in_turns, no_garbage_collection, summary

# Of a derivative, relative. The norms of transformers compute in float32 in a model of float64, too.
TOLERANCE = 2e-3
STEP = 1e-3


class Tuning:
    """One variant, ready to run."""

    def __init__(self, case: AdapterCase, variant: AdapterVariant, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model = case.model()
        self.model = self.model.to(device, dtype).train()
        self.wrapped = variant.apply(self.model)
        if case.checkpointed:
            self.model.enable_input_require_grads()
            enable_checkpointing(self.model)
        generator = torch.Generator().manual_seed(1)
        vocabulary = self.model.config.vocab_size
        self.tokens, self.labels = torch.randint(vocabulary, (2, *case.shape), generator=generator).to(device)
        self.optimizer = variant.optimizer(self.wrapped or self.model)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self) -> Tensor:
        return self.model(input_ids=self.tokens, labels=self.labels).loss

    def hidden(self) -> Tensor:
        """What the decoder layers give, without the head and the loss."""
        return self.model.model(input_ids=self.tokens).last_hidden_state

    def run(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_bytes(self) -> int:
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return sum(value.nbytes for value in states if isinstance(value, Tensor))

    def file_bytes(self) -> int:
        """The adapter's weights on disk; of full fine-tuning, all weights."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        holder = self.wrapped or self.model
        tuned = hasattr(holder, "peft_config")
        tensors = get_peft_model_state_dict(holder) if tuned else dict(self.model.named_parameters())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter.safetensors"
            save_file({name: t.detach().contiguous().cpu().clone() for name, t in tensors.items()}, path)
            return path.stat().st_size


def run_adapter_case(case: AdapterCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of every variant, from `rounds` timed steps each.

    For each: `trained` parameters; `kept_bytes` for backward, and `kept_layers_bytes` without head and loss;
    `peak_bytes` of a step; `optimizer_bytes`; `file_bytes` of what is saved; times; `error` of a derivative.

    Raises:
        CheckFailed: a variant's gradient is not the derivative, or its output at the start is not the base's.
    """
    gate = replace(case, **case.gate)
    errors = {variant.name: checked(gate, variant, device) for variant in case.variants}
    figures = [{"variant": v.name, **bytes_of(case, v, device), "error": errors[v.name]} for v in case.variants]
    times: list[list[tuple[float, float]]] = [[] for _ in case.variants]
    steps = STEPS_PER_TURN.get(device, 1)
    for index in in_turns(len(case.variants), max(2, rounds // steps)):
        with opened(case, case.variants[index], device) as tuning:
            for _ in range(2):
                tuning.run()
            with no_garbage_collection():
                times[index] += [elapsed(tuning.run, 1, device) for _ in range(steps)]
    return [f | asdict(summary(t)) for f, t in zip(figures, times, strict=True)], {}


@contextmanager
def opened(
    case: AdapterCase, variant: AdapterVariant, device: str, dtype: torch.dtype | None = None
) -> Iterator[Tuning]:
    tuning = Tuning(case, variant, device, dtype or case.dtype)
    yield tuning
    del tuning
    release(device)


def bytes_of(case: AdapterCase, variant: AdapterVariant, device: str) -> dict[str, int]:
    with opened(case, variant, device) as tuning:
        tuning.run()  # the first step makes the optimizer's states
        return {
            "trained": sum(p.numel() for p in tuning.trained),
            "kept_bytes": memsave.saved_bytes(tuning.loss),
            "kept_layers_bytes": memsave.saved_bytes(tuning.hidden),
            "peak_bytes": memsave.measure(tuning.run).peak_bytes,
            "optimizer_bytes": tuning.optimizer_bytes(),
            "file_bytes": tuning.file_bytes(),
        }


def checked(case: AdapterCase, variant: AdapterVariant, device: str) -> float:
    """The relative error of a derivative, in fp64, at random values of the adapter."""
    with opened(case, variant, device, torch.float64) as tuning:
        with opened(case, case.variants[0], device, torch.float64) as plain:
            difference = float((tuning.loss() - plain.loss()).detach().abs())
        if not difference <= 1e-5:
            raise CheckFailed(f"{variant.name}: at the start its loss differs from the base's by {difference:.1e}")
        generator = torch.Generator().manual_seed(2)
        random = [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in tuning.trained]
        move(tuning, random, 0.05)
        tuning.model.zero_grad()
        tuning.loss().backward()
        # Along the gradient of each parameter, where a derivative is large, but not with the same weight.
        direction = [
            weight * (p.grad if float(p.grad.norm()) else v) / (p.grad.norm() or v.norm())
            for p, v, weight in zip(tuning.trained, random, torch.linspace(0.5, 1.5, len(random)).tolist(), strict=True)
        ]
        predicted = sum(float((p.grad * v).sum()) for p, v in zip(tuning.trained, direction, strict=True))
        move(tuning, direction, STEP)
        above = float(tuning.loss().detach())
        move(tuning, direction, -2 * STEP)
        derivative = (above - float(tuning.loss().detach())) / (2 * STEP)
    error = abs(predicted - derivative) / abs(derivative)
    if not error <= TOLERANCE:
        raise CheckFailed(f"{variant.name}: its gradient along a direction is {predicted:.8g}, not {derivative:.8g}")
    return error


@torch.no_grad()
def move(tuning: Tuning, direction: list[Tensor], length: float) -> None:
    for parameter, v in zip(tuning.trained, direction, strict=True):
        parameter.add_(v, alpha=length)
