"""Storages: what a byte count counts.

A tensor is a view on a storage, and the storage owns the bytes. Views, aliases, in-place results and tied parameters
share one storage, so every count in memsave goes by storage and not by tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A tensor without a storage of its own (oneDNN blobs) stands for its bytes itself.
Storage = torch.UntypedStorage | Tensor


def storages_of(tensor: Tensor) -> Iterator[Storage]:
    """Yield the storages that hold the bytes of `tensor`.

    One for a strided tensor (real, fake or on the meta device); those of the index and value tensors for a sparse one;
    those of the inner tensors for a wrapper subclass (DTensor, quantized, jagged).
    """
    if tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif is_wrapper(type(tensor)):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # type: ignore[attr-defined]
        parts = [part for part in inner if isinstance(part, Tensor)]  # a DTensor names its device mesh, too
    else:
        try:
            yield tensor.untyped_storage()
        except NotImplementedError:  # an opaque tensor
            yield tensor
        return
    for part in parts:
        yield from storages_of(part)


def is_wrapper(tensor_type: type) -> bool:
    """Whether tensors of this type only wrap other tensors, and hold no bytes themselves."""
    return hasattr(tensor_type, "__tensor_flatten__")


def nbytes(storage: Storage) -> int:
    """Bytes of a storage now. A fake or meta storage counts as if it were real."""
    return storage.nbytes() if isinstance(storage, torch.UntypedStorage) else storage.nbytes


def module_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of `module` itself, without those that a lazy module has not created yet."""
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None and not nn.parameter.is_lazy(tensor):
            yield tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dicts, such as the arguments of an op."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


# What a storage is for, weakest claim first: a parameter stays a weight even if an optimizer's state holds it too.
_ROLES = ("", "optimizer", "gradients", "weights")


class Record:
    """One storage during its life.

    Attributes:
        nbytes: its last known size.
        role: "weights", "optimizer", "gradients" or "" (none of them, as far as is known yet).
        existed: whether it is older than the measurement.
        counted: whether it belongs to what is measured.
        module: name of the module that allocated it.
    """

    __slots__ = ("counted", "existed", "module", "nbytes", "role")

    def __init__(self, size_bytes: int) -> None:
        self.nbytes = size_bytes
        self.role = ""
        self.existed = False
        self.counted = True
        self.module = ""

    def claim(self, role: str) -> None:
        """Set the role, unless a stronger one is known."""
        self.role = max(self.role, role, key=_ROLES.index)


class StorageTable:
    """One `Record` per live storage. Holds storages weakly, so it changes nothing about when their memory is freed.

    Args:
        on_free: called with the record when its storage has been freed.
    """

    def __init__(self, on_free: Callable[[Record], None] | None = None) -> None:
        self._entries: dict[int, tuple[Record, weakref.ref[Storage]]] = {}
        self._on_free = on_free

    def find(self, storage: Storage) -> Record | None:
        """The record of `storage`, or None if it has none yet."""
        entry = self._entries.get(storage._cdata)
        return entry[0] if entry else None

    def add(self, storage: Storage) -> Record:
        """A new record for `storage`, which must have none yet."""
        key, record = storage._cdata, Record(nbytes(storage))

        def freed(_: weakref.ref[Storage]) -> None:
            # The address can serve another storage from here on.
            self._entries.pop(key, None)
            if self._on_free is not None:
                self._on_free(record)

        self._entries[key] = (record, weakref.ref(storage, freed))
        return record

    def find_or_add(self, storage: Storage) -> Record:
        """The record of `storage`, made now if it has none yet."""
        return self.find(storage) or self.add(storage)

    def __iter__(self) -> Iterator[tuple[Record, Storage]]:
        for record, ref in list(self._entries.values()):
            storage = ref()
            if storage is not None:
                yield record, storage

    def close(self) -> None:
        """Forget all records; `on_free` is not called any more."""
        self._entries.clear()
