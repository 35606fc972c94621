"""Random programs of small ops: the tracker against an interpreter that only does arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from memsave.memory import measure

from .helpers import FLOAT_BYTES

# An instruction: the op, a number that picks its variable, a number that picks a size or a second variable.
INSTRUCTIONS = st.tuples(
    st.sampled_from(["new", "add", "view", "in place", "join", "split", "delete", "resize", "free"]),
    st.integers(0, 99),
    st.integers(0, 99),
)


def run(program: list[tuple[str, int, int]], variables: list[Tensor]) -> None:
    """Run `program` on a list of 1-D tensors, each at least one element long."""
    emptied = []
    for op, first, second in program:
        if op == "new":
            variables.append(torch.zeros(second + 1))
        if not variables:
            continue
        index = first % len(variables)
        if op == "add":
            variables.append(variables[index] + 1)
        elif op == "view":
            variables.append(variables[index][: second + 1])
        elif op == "in place":
            variables[index].mul_(2)
        elif op == "join":
            variables.append(torch.cat([variables[index], variables[second % len(variables)]]))
        elif op == "split":
            variables.extend(torch.split_copy(variables[index], second + 1))
        elif op == "delete":
            del variables[index]
        elif op == "resize":
            variables[index].resize_(second + 1)
        elif op == "free":
            # Behind the dispatcher's back. The storage lives on without bytes, and no tensor on it can be used again.
            storage = variables[index].untyped_storage()
            storage.resize_(0)
            emptied.append(storage)
            variables[:] = [tensor for tensor in variables if tensor.untyped_storage()._cdata != storage._cdata]


@dataclass
class Block:
    """A storage of the interpreter."""

    nbytes: int
    existed: bool = False
    touched: bool = False


@dataclass
class Interpreter:
    """The same programs on (block, length) pairs. Live bytes are summed after each instruction."""

    variables: list[tuple[Block, int]]
    trace: list[list[tuple[Block, int]]] = field(default_factory=list)

    def new(self, length: int) -> None:
        self.variables.append((Block(length * FLOAT_BYTES), length))

    def run(self, program: list[tuple[str, int, int]]) -> tuple[int, int]:
        """The peak and the bytes at the start."""
        existing = [(block, block.nbytes) for block, _ in self.variables]
        for instruction in program:
            self.step(*instruction)
            blocks = {id(block): block for block, _ in self.variables}
            self.trace.append([(block, block.nbytes) for block in blocks.values()])
        moments = [existing, *self.trace]
        sizes = [sum(size for block, size in moment if block.touched or not block.existed) for moment in moments]
        return max(sizes), sizes[0]

    def step(self, op: str, first: int, second: int) -> None:
        if op == "new":
            self.new(second + 1)
        if not self.variables:
            return
        index = first % len(self.variables)
        block, length = self.variables[index]
        if op in ("add", "view", "in place", "join", "split", "resize"):
            block.touched = True
        if op == "add":
            self.new(length)
        elif op == "view":
            self.variables.append((block, min(length, second + 1)))
        elif op == "join":
            other, other_length = self.variables[second % len(self.variables)]
            other.touched = True
            self.new(length + other_length)
        elif op == "split":
            for start in range(0, length, second + 1):
                self.new(min(second + 1, length - start))
        elif op == "delete":
            del self.variables[index]
        elif op == "resize":
            block.nbytes = max(block.nbytes, (second + 1) * FLOAT_BYTES)
            self.variables[index] = (block, second + 1)
        elif op == "free":
            block.nbytes = 0
            self.variables = [(other, size) for other, size in self.variables if other is not block]


@settings(max_examples=60, deadline=None)
@given(program=st.lists(INSTRUCTIONS, max_size=25), lengths=st.lists(st.integers(1, 100), max_size=4))
def test_tracker_equals_interpreter(program: list[tuple[str, int, int]], lengths: list[int]) -> None:
    existing = [(Block(length * FLOAT_BYTES, existed=True), length) for length in lengths]
    expected = Interpreter(existing).run(program)
    for context in (torch.no_grad(), FakeTensorMode()):
        with context:
            variables = [torch.zeros(length) for length in lengths]
            profile = measure(lambda: run(program, variables))  # noqa: B023
        assert (profile.peak_bytes, profile.baseline_bytes) == expected
