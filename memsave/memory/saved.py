"""Bytes kept for backward, counted while a function runs.

Autograd hands every tensor that it saves to the saved-tensors hook on top and keeps the hook's answer, a *handle*,
until the node that saved it is freed. A storage is kept while at least one handle to it is alive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .modules import ModuleWatch
from .storages import Record, StorageTable, nbytes, storages_of


class SavedTensor:
    """The handle that autograd keeps in place of a saved tensor."""

    __slots__ = ("on_release", "tensor", "version")

    def __init__(self, tensor: Tensor, on_release: Callable[[], None]) -> None:
        self.on_release = on_release
        # Not the tensor itself: an output would hold its own graph node in a reference cycle.
        self.tensor = tensor.detach()
        self.version = tensor._version

    def __del__(self) -> None:
        self.on_release()

    def unpack(self) -> Tensor:
        """The tensor; raises RuntimeError if it was modified in place (autograd does not check under a hook)."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} tensor of shape {list(self.tensor.shape)}, expected at version {self.version}, "
                f"is at version {self.tensor._version}. To find the operation that failed to compute its gradient, run "
                "the same code without memory measurement under torch.autograd.set_detect_anomaly(True)."
            )
        return self.tensor


def saved_tensors_hooks(
    on_save: Callable[[Tensor], list[Record]], on_release: Callable[[list[Record]], None]
) -> torch.autograd.graph.saved_tensors_hooks:
    """The context in which `on_save` hears of every saved tensor and `on_release` of every freed handle.

    `on_save` gets the tensor and returns its records, which are given to `on_release` once, when the handle is freed.
    """

    def pack(tensor: Tensor) -> SavedTensor:
        records = on_save(tensor)
        return SavedTensor(tensor, lambda: on_release(records))

    pack.counts_only = True  # type: ignore[attr-defined]  # read by nn/note.py: what is saved here stays where it is
    return torch.autograd.graph.saved_tensors_hooks(pack, SavedTensor.unpack)


def check_function(owner: str, fn: object) -> None:
    """Raise TypeError if `fn` is a result instead of a function."""
    if not callable(fn):
        example = "such as lambda: model(**batch).loss"
        raise TypeError(f"{owner}: expected a function without arguments, {example}, got {type(fn).__name__}")


def saved_bytes(fn: Callable[[], object]) -> int:
    """Bytes that autograd keeps for backward while `fn()` runs: the largest number held at once.

    For a `fn` that only runs forward this is what its backward would need; for one that also runs backward it is the
    largest number of bytes kept at any moment.

    Every storage counts once and in full, however many saved tensors are views of it. Inputs count. The parameters and
    buffers of every `nn.Module` that runs inside `fn` (and of its submodules) do not, nor do views and aliases of
    them; a copy, such as a half-precision cast under autocast, does. Fake and meta tensors count as if they were real,
    and tensors on all devices are added up.

    What another saved-tensors hook takes over inside `fn` is hidden from the count:

    - activation checkpointing counts with the inputs that it keeps; what backward recomputes for one segment is counted
      with `use_reentrant=True` only;
    - `save_on_cpu` and other offloading count as nothing, wherever their copies lie.

    Tensors that a custom `autograd.Function` stores as attributes of `ctx` are not seen. `torch.func` transforms
    raise, since they do not allow saved-tensors hooks.

    Args:
        fn: called once, without arguments. Its result is dropped.

    Returns:
        Bytes.

    Raises:
        TypeError: `fn` is no function.
        RuntimeError: in a backward inside `fn`, if a saved tensor was modified in place, as without the measurement.
    """
    check_function("saved_bytes", fn)
    table = StorageTable()
    # (record, +bytes) when a storage starts to be kept and (record, -bytes) when its last handle goes; added up at the
    # end, because a saved weight may be known as one only after a later module has run.
    changes: list[tuple[Record, int]] = []
    handle_counts: dict[Record, int] = {}
    kept_sizes: dict[Record, int] = {}

    def on_save(tensor: Tensor) -> list[Record]:
        records = []
        for storage in storages_of(tensor):
            record = table.find_or_add(storage)
            if not handle_counts.get(record):
                kept_sizes[record] = nbytes(storage)
                changes.append((record, kept_sizes[record]))
            handle_counts[record] = handle_counts.get(record, 0) + 1
            records.append(record)
        return records

    def on_release(records: list[Record]) -> None:
        for record in records:
            handle_counts[record] -= 1
            if not handle_counts[record]:
                changes.append((record, -kept_sizes[record]))

    def on_weight(module: nn.Module, tensor: Tensor) -> None:
        for storage in storages_of(tensor):
            table.find_or_add(storage).claim("weights")

    with ModuleWatch(on_weight), saved_tensors_hooks(on_save, on_release):
        fn()
        counted = list(changes)

    kept_bytes = largest_bytes = 0
    for record, change_bytes in counted:
        if record.role != "weights":
            kept_bytes += change_bytes
            largest_bytes = max(largest_bytes, kept_bytes)
    return largest_bytes
