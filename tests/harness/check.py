"""`check`: one implementation of one op on one row of the case table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .case import OpCase, OpSpec, as_tuple
from .compare import assert_same, assert_within_budget
from .guards import FILLS, Guarded, GuardedMemory, extent, guarded


def check(
    case: OpCase,
    implementation: Callable[..., Any],
    device: str = "cpu",
    *,
    deterministic: Sequence[bool] = (False, True),
) -> None:
    """Demands all that an op promises, of one implementation on one row.

    It runs with unwritten memory full of NaN and of a large number, with and without
    `torch.use_deterministic_algorithms`. Every run must give the right values (the bits of the oracle, or an error
    against float64 of at most twice that of plain PyTorch); runs of one mode the same bits. Outputs are contiguous and
    own their memory, no larger than needed. Nothing is written outside of them, and no input is modified, but those
    that the op declares to write to.

    Args:
        case: the row.
        implementation: takes the row's arguments, as `memsave/ops/<op>/native.py::launch` does.
        device: where it runs.
        deterministic: the modes to run in.

    Raises:
        AssertionError: op, row, mode, what differs and where.
    """
    args = case.make()
    expected = Expected(case.spec, args)
    for mode in deterministic:
        first: tuple[Tensor, ...] | None = None
        for fill in FILLS:
            name = "deterministic" if mode else "default"
            where = f"{case.id} on {device} ({name} mode, new memory holds {fill})"
            with _mode(mode, device):
                outputs = _run(args, implementation, device, fill, where, case.spec.writes)
            expected.compare(outputs, where)
            if first is not None:
                assert_same(outputs, first, f"{where}: not the same bits in two runs")
            first = outputs


class Expected:
    """The right results of one row, computed once and on the CPU, whatever device is checked."""

    def __init__(self, spec: OpSpec, args: tuple[Any, ...]) -> None:
        self.spec = spec
        self.oracle = None if spec.oracle is None else as_tuple(spec.oracle(*args))
        self.plain = None if spec.plain is None else as_tuple(spec.plain(*args))

    def compare(self, outputs: tuple[Tensor, ...], where: str) -> None:
        if self.oracle is None:
            return
        assert len(outputs) == len(self.oracle), f"{where}: {len(outputs)} outputs, expected {len(self.oracle)}"
        for i, (output, right) in enumerate(zip(outputs, self.oracle, strict=True)):
            name = f"{where}, output {i}" if len(outputs) > 1 else where
            if self.spec.is_exact(i):
                assert_same(output, right, name)
            else:
                assert self.plain is not None, f"{self.spec.name}: an output that rounds needs `plain` in its OpSpec"
                assert_within_budget(output, right, self.plain[i], name, slack=self.spec.slack)


def _run(
    args: tuple[Any, ...],
    implementation: Callable[..., Any],
    device: str,
    fill: str,
    where: str,
    writes: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """One run between guards; all of its promises but the values."""
    inputs = {i: guarded(a, device) for i, a in enumerate(args) if isinstance(a, Tensor)}
    new = GuardedMemory(fill)
    with new:
        outputs = as_tuple(implementation(*(inputs[i].tensor if i in inputs else a for i, a in enumerate(args))))
    for i, found in inputs.items():
        change = found.change(written=i in writes)
        assert change is None, f"{where}: argument {i} was {change}"
    for found in new.found:
        change = found.change()
        assert change is None, f"{where}: a new tensor of shape {tuple(found.tensor.shape)} was {change}"
    taken = {found.buffer.untyped_storage().data_ptr(): f"argument {i}" for i, found in inputs.items()}
    for i, output in enumerate(outputs):
        _check_memory(output, i, new.found, taken, where)
    return (*outputs, *(inputs[i].tensor for i in writes))


def _check_memory(output: Tensor, i: int, new: list[Guarded], taken: dict[int, str], where: str) -> None:
    """An output is contiguous and has memory of its own, no larger than itself. Adds it to `taken`."""
    assert output.is_contiguous(), f"{where}: output {i} is not contiguous, its strides are {output.stride()}"
    address = output.untyped_storage().data_ptr()
    if address == 0:  # no elements, no memory
        return
    assert address not in taken, f"{where}: output {i} shares the memory of {taken[address]}"
    taken[address] = f"output {i}"
    held = output.untyped_storage().nbytes() // output.element_size()
    for found in new:
        if found.buffer.untyped_storage().data_ptr() == address:
            held = extent(found.tensor)
    assert held == output.numel(), f"{where}: output {i} is a view: {output.numel()} elements in memory for {held}"


@contextmanager
def _mode(deterministic: bool, device: str) -> Iterator[None]:
    """torch's deterministic algorithms on or off, and random numbers that do not go on: each run draws the same."""
    devices = [] if device == "cpu" else [torch.cuda.current_device()]
    with warnings.catch_warnings(), torch.random.fork_rng(devices), _deterministic(deterministic, device):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _deterministic(wanted: bool, device: str) -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Only a warning on GPUs: cuBLAS is refused unless a variable was set before the process started.
    setting = wanted, wanted and device != "cpu"
    if was == setting:  # torch imports its compiler at the first change, which takes seconds
        yield
        return
    torch.use_deterministic_algorithms(setting[0], warn_only=setting[1])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
