"""What was in memory when it ran out: the largest live tensors, by module and phase."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from ..text import aligned, groups, pattern
from .modules import BEFORE
from .noting import NotingTracker, Origin
from .profile import CATEGORIES, format_bytes
from .replay import category_of
from .storages import Record, storages_of
from .tracker import StorageTracker

# How torch words it on the CPU; on a GPU it raises torch.OutOfMemoryError.
_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory", "out of memory")


@dataclass(frozen=True, kw_only=True)
class LiveTensors:
    """Live tensors of one shape that one group of modules made in one phase, or owns as its weights.

    Attributes:
        modules: the innermost modules that ran when they were made, as a pattern; in parentheses what no module made.
        phase: when they were made, as in `MemoryProfile`, or "before" the block.
        category: what they are for, one of the categories of `MemoryProfile`.
        shape, dtype: of one of them.
        count: how many storages there are.
        total_bytes: of all of them.
    """

    modules: str
    phase: str
    category: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    total_bytes: int


class OOMReport:
    """What `memsave.oom_report` gives: empty, until memory runs out within the block.

    Attributes:
        error: the error's first line; None if there was none.
        module, phase, op: what ran then.
        live_bytes: bytes of all live tensors then, of those that were used within the block.
        by_category: the same by the categories of `MemoryProfile`.
        largest: live tensors, largest first.
        allocator: on CUDA, bytes that torch's allocator has given out ("allocated") and holds ("reserved").
    """

    def __init__(self) -> None:
        self.error: str | None = None
        self.module = self.phase = self.op = ""
        self.live_bytes = 0
        self.by_category: dict[str, int] = {}
        self.largest: tuple[LiveTensors, ...] = ()
        self.allocator: dict[str, int] = {}

    def table(self, *, tensors: int = 20) -> str:
        """The report as text, with the `tensors` largest groups of tensors."""
        if self.error is None:
            return "memsave.oom_report: memory did not run out"
        lines = [
            f"memsave: out of memory in {self.phase}, in {self.module}, in {self.op}",
            f"  {self.error}",
            f"live tensors then: {format_bytes(self.live_bytes)} ("
            + ", ".join(f"{name} {format_bytes(size)}" for name, size in self.by_category.items() if size)
            + ")",
        ]
        lines += aligned([_cells(group) for group in self.largest[:tensors]])
        if rest := self.largest[tensors:]:
            size = sum(group.total_bytes for group in rest)
            lines.append(f"  {format_bytes(size)} in {sum(group.count for group in rest)} smaller ones")
        return "\n".join([*lines, *self._advice()])

    __str__ = table

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return vars(self) | {"largest": [asdict(group) for group in self.largest]}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _advice(self) -> list[str]:
        unused = self.allocator.get("reserved", 0) - self.allocator.get("allocated", 0)
        if unused <= 0.1 * self.allocator.get("reserved", 0):
            return []
        return [
            f"torch's allocator holds {format_bytes(unused)} more than tensors use: fragments. "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True may help."
        ]


def _cells(group: LiveTensors) -> tuple[str, ...]:
    shape = "x".join(map(str, group.shape)) or "scalar"
    made = "made before" if group.phase == "before" else f"made in {group.phase}"
    kind = f"{group.dtype} {shape}"
    return format_bytes(group.total_bytes), f"x{group.count}", group.modules, kind, group.category, made


@contextmanager
def oom_report(*, file: TextIO | None = None) -> Iterator[OOMReport]:
    """If memory runs out in the block, print what was in it, and raise the error on.

    Works on the CPU, where an allocation fails (not where the system kills the process), and on CUDA. Every operator of
    torch in the block is followed, as by `memsave.measure`, which makes steps of small operators slower: put it around
    the step that fails, not around a whole training run. What is in a tensor that was made before the block and is not
    used in it is not seen.

    Args:
        file: where to print; None for standard error.

    Yields:
        The report, which is filled when the error is raised: keep it to read it after catching the error.

    Raises:
        The error of the block, whatever it is.
    """
    report, tracker = OOMReport(), _LastTracker()
    try:
        with tracker:
            yield report
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            tracker.fill(report, error)
            print(report, file=sys.stderr if file is None else file)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU or on an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


class _LastTracker(NotingTracker):
    """Remembers what was live when an operator failed: while the error is raised, tensors are freed.

    It writes no events down, since nothing is replayed: the block may be long.
    """

    def __init__(self) -> None:
        super().__init__()
        self._handles: Counter[Record] = Counter()
        self._where = ("(outside modules)", "other", "no operator of torch")
        self._live: list[LiveTensors] = []

    def fill(self, report: OOMReport, error: BaseException) -> None:
        report.error = str(error).strip().partition("\n")[0] or type(error).__name__
        report.module, report.phase, report.op = self._where
        report.largest = tuple(sorted(self._live, key=lambda group: -group.total_bytes))
        for category in CATEGORIES:
            report.by_category[category] = sum(g.total_bytes for g in self._live if g.category == category)
        report.live_bytes = sum(report.by_category.values())
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            report.allocator = {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                self._where = (self._modules.current(torch._C._current_autograd_node()), self._phase, str(func))
                self._live = self._groups()
            raise

    def _groups(self) -> list[LiveTensors]:
        sizes: dict[tuple[str, Origin], dict[str, list[int]]] = {}
        for record, _ in self._table:
            if record.counted:
                category, origin = category_of(record, self._handles[record] > 0), self.origins[record]
                origin = origin._replace(phase="before") if record.existed else origin
                sizes.setdefault((category, origin), {}).setdefault(record.module, []).append(record.nbytes)
        found = []
        for (category, origin), names in groups((key, name) for key, by_name in sizes.items() for name in by_name):
            each = [size for name in names for size in sizes[category, origin][name]]
            found.append(
                LiveTensors(
                    modules=pattern(names),
                    phase=origin.phase,
                    category=category,
                    shape=origin.shape,
                    dtype=str(origin.dtype).removeprefix("torch."),
                    count=len(each),
                    total_bytes=sum(each),
                )
            )
        return found

    def _on_weight(self, module: nn.Module | None, tensor: Tensor) -> None:
        super()._on_weight(module, tensor)
        if module is not None and (name := self._modules.name_of(module)) is not None:
            for storage in storages_of(tensor):
                if (record := self._table.find(storage)) is not None and record.module == BEFORE:
                    record.module = name

    def _change(self, record: Record, change_bytes: int, change_handles: int = 0) -> None:
        self._live_bytes += change_bytes * record.counted
        if change_handles:
            self._handles[record] += change_handles
            if not self._handles[record]:
                del self._handles[record]

    def _on_save(self, tensor: Tensor) -> list[Record]:
        return StorageTracker._on_save(self, tensor)

    def _on_free(self, record: Record) -> None:
        super()._on_free(record)
        self.origins.pop(record, None)
