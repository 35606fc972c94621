"""oom_report: what was live when memory ran out, by the module and phase that made it. 1e17 bytes never fit."""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.memory.oom import is_out_of_memory

from .helpers import hook_state

ROWS, WIDTH = 10, 64
TOO_MANY = 10**17


def run_out(*_: Any) -> None:
    torch.empty(TOO_MANY)


class Model(nn.Module):
    """Two blocks (N, D) -> (N, D); `where` picks what runs out of memory."""

    def __init__(self, where: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        if where == "forward":
            self.blocks[1][1].register_forward_pre_hook(run_out)
        elif where == "backward":
            self.blocks[0].register_full_backward_pre_hook(run_out)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def failed(where: str, step: Callable[[nn.Module], object]) -> tuple[memsave.OOMReport, str]:
    model, file = Model(where), io.StringIO()
    with pytest.raises(RuntimeError, match="allocate memory"), memsave.oom_report(file=file) as report:
        step(model)
    return report, file.getvalue()


def train(model: nn.Module) -> None:
    model(torch.ones(ROWS, WIDTH)).backward()


def groups_of(report: memsave.OOMReport) -> dict[tuple[str, str, str], tuple[int, int]]:
    return {(g.modules, g.phase, g.category): (g.count, g.total_bytes) for g in report.largest}


def test_forward() -> None:
    report, text = failed("forward", train)
    assert (report.module, report.phase, report.op) == ("blocks.1.1", "forward", "aten.empty.memory_format")
    tensor, weight = ROWS * WIDTH * 4, WIDTH * WIDTH * 4
    found = groups_of(report)
    assert found["blocks.{0-1}.0", "before", "weights"] in ((2, 2 * weight), (2, 2 * WIDTH * 4))
    assert sum(g.total_bytes for g in report.largest if g.category == "weights") == 2 * (weight + WIDTH * 4)
    assert found["blocks.0.{0-1}", "forward", "kept for backward"] == (2, 2 * tensor)
    assert found["blocks.1.0", "forward", "temporary"] == (1, tensor)  # what the second would
    kept = sum(g.total_bytes for g in report.largest if g.category == "kept for backward")
    assert kept == 3 * tensor  # the input, the first linear's output, the first block's output
    assert report.live_bytes == sum(report.by_category.values()) == sum(g.total_bytes for g in report.largest)
    assert [g.total_bytes for g in report.largest] == sorted((g.total_bytes for g in report.largest), reverse=True)
    assert text.strip() == str(report)
    assert "out of memory in forward, in blocks.1" in text and f"float32 {ROWS}x{WIDTH}" in text


def test_backward() -> None:
    report, _ = failed("backward", train)
    assert report.phase == "backward"
    assert any(g.phase == "backward" for g in report.largest)
    assert report.by_category["gradients"] >= WIDTH * WIDTH * 4  # of the second block, whose backward is done


def test_optimizer() -> None:
    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            run_out()

    def step(model: nn.Module) -> None:
        optimizer = Greedy(model.parameters(), lr=0.1, momentum=0.9)
        train(model)
        optimizer.step()

    report, _ = failed("", step)
    weights = sum(p.nbytes for p in Model().parameters())
    assert report.phase == "optimizer"
    assert {report.by_category[name] for name in ("weights", "gradients")} == {weights}
    assert weights <= report.by_category["optimizer"] + report.by_category["temporary"]


def test_outside_of_modules() -> None:
    report, text = failed("", run_out)
    assert (report.module, report.live_bytes) == ("(outside modules)", 0)
    assert "out of memory in" in text


def test_what_the_system_says_without_torch() -> None:
    file = io.StringIO()
    with pytest.raises(MemoryError), memsave.oom_report(file=file) as report:
        kept = torch.ones(5)
        bytearray(TOO_MANY)
    assert report.op == "no operator of torch" and report.error is not None
    assert kept.numel() == 5


def test_other_errors_are_none_of_its_business() -> None:
    file, before = io.StringIO(), hook_state()
    with pytest.raises(RuntimeError, match="shapes"), memsave.oom_report(file=file) as report:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert file.getvalue() == "" and report.error is None
    assert str(report) == "memsave.oom_report: memory did not run out"
    assert hook_state() == before


def test_a_step_that_fits_changes_nothing() -> None:
    model, file, before = Model(), io.StringIO(), hook_state()
    with memsave.oom_report(file=file) as report:
        train(model)
    expected = Model()
    expected.load_state_dict(model.state_dict())
    train(expected)
    for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)
    assert file.getvalue() == "" and report.error is None and hook_state() == before


def test_hooks_are_gone_after_the_error() -> None:
    before = hook_state()
    failed("forward", train)
    assert hook_state() == before


def test_a_long_block_writes_nothing_down() -> None:
    model = Model()
    with memsave.oom_report(file=io.StringIO()):
        train(model)
        gc.collect()
        before = len(gc.get_objects())
        for _ in range(20):
            train(model)
        gc.collect()
        assert len(gc.get_objects()) - before < 20


def test_data() -> None:
    report, _ = failed("forward", train)
    data = json.loads(report.to_json())
    assert data["live_bytes"] == report.live_bytes and data["largest"][0]["shape"] == list(report.largest[0].shape)
    shown = report.table(tensors=2).splitlines()
    assert "smaller ones" in shown[-1] and len(shown) < len(str(report).splitlines())


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    ],
)
def test_errors_that_say_so(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("the sizes of tensors must match"))
