"""Measures feed-forward blocks, dense and routed: outputs and gradients checked first, then bytes, work and times."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import memsave
from benchmarks.cases.routed_ffn import BLOCKS, RoutedFFNCase, RoutedWay
from benchmarks.checks import CheckFailed, check_exact
from memsave.nn.routed_ffn import RoutedFFN

from .timing import elapsed, in_turns, no_garbage_collection, summary


def _added_product(*shapes: Any, **_: Any) -> int:
    return addmm_flop(*shapes[:3])


_UNCOUNTED = {torch.ops.aten.addmm_: _added_product}


class BlockStep:
    """One way, ready to run forward and backward for x (N, d) and dy (N, d), with the dense block's own weights."""

    def __init__(self, way: RoutedWay, dense: nn.Module, x: Tensor, dy: Tensor) -> None:
        self.way, self.x, self.dy = way, x.detach().requires_grad_(), dy
        model = nn.Sequential(copy.copy(dense))
        if way.active is not None:
            torch.manual_seed(2)
            config = memsave.RoutedFFNConfig(blocks=BLOCKS, active=way.active, target_modules=["0"])
            memsave.convert_model(model, config)
        self.block: nn.Module = model[0]

    def forward(self) -> Tensor:
        if self.way.checkpointed:
            return checkpoint(self.block, self.x, use_reentrant=False)
        return self.block(self.x)

    def run(self) -> None:
        self.forward().backward(self.dy)

    def clear(self) -> None:
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None

    def results(self, forward: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The output and all gradients, in fp64."""
        self.clear()
        y = forward()
        y.backward(self.dy)
        found = {"output": y.detach(), "input": self.x.grad}
        found |= {name: parameter.grad for name, parameter in self.block.named_parameters()}
        gathered = {name: tensor.double() for name, tensor in found.items() if tensor is not None}
        self.clear()
        return gathered


def run_routed_ffn_case(case: RoutedFFNCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """For each way `kept_bytes`, `peak_bytes` beyond weights and input, `macs` of a step, times, `error`.

    Raises:
        CheckFailed: a way computes something else than its masked dense reference, or keeps other bytes than stated.
    """
    torch.manual_seed(0)
    dense = case.model(case.width, case.hidden).to(device)
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(case.tokens, case.width, generator=generator).to(device) for _ in range(2))
    errors = {way.name: checked(way, dense, x[: case.checked_tokens], dy[: case.checked_tokens]) for way in case.ways}
    steps = [BlockStep(way, dense, x, dy) for way in case.ways]
    figures = [{"way": step.way.name, "error": errors[step.way.name]} | bytes_and_work(step) for step in steps]
    times: list[list[tuple[float, float]]] = [[] for _ in steps]
    with no_garbage_collection():
        for index in in_turns(len(steps), min(rounds, case.most_rounds)):
            times[index].append(elapsed(steps[index].run, 1, device))
            steps[index].clear()
    return [f | asdict(summary(t)) for f, t in zip(figures, times, strict=True)], {}


def checked(way: RoutedWay, dense: nn.Module, x: Tensor, dy: Tensor) -> float:
    """The error of a way's output and gradients over that of its reference: all units, masked, in plain autograd."""
    step = BlockStep(way, dense, x, dy)
    reference = _reference(step)
    found, plain = step.results(step.forward), step.results(lambda: reference(step.x))
    wide = BlockStep(way, copy.deepcopy(dense).double(), x.double(), dy.double())
    wide.block.load_state_dict(step.block.state_dict())
    truth = wide.results(lambda: _reference(wide)(wide.x))
    return check_exact(way.name, found, plain, truth, set(), torch.float32)


def _reference(step: BlockStep) -> Callable[[Tensor], Tensor]:
    return step.block.reference if isinstance(step.block, RoutedFFN) else step.block


def bytes_and_work(step: BlockStep) -> dict[str, int]:
    kept_bytes = memsave.saved_bytes(step.forward)
    block = step.block
    if isinstance(block, RoutedFFN) and kept_bytes != (stated := block.kept_bytes(step.x.shape, step.x.dtype)):
        raise CheckFailed(f"{step.way.name}: it keeps {kept_bytes:,} bytes, stated are {stated:,}")
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        step.run()
    step.clear()
    profile = memsave.measure(step.run)
    step.clear()
    peak_bytes = profile.peak_bytes - profile.baseline_bytes
    return {"kept_bytes": kept_bytes, "peak_bytes": peak_bytes, "macs": counter.get_total_flops() // 2}
