"""Live storages during a run: a dispatch mode that notes what every op allocates, frees and resizes.

Sizes are read from the storages, so the mode counts real and fake tensors alike. It sees no memory inside an op, except
what memsave's own ops declare.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .modules import BEFORE, ModuleNames, ModuleWatch, OwnThread, is_accumulate_grad
from .replay import Event
from .saved import saved_tensors_hooks
from .storages import Record, Storage, StorageTable, is_wrapper, nbytes, storages_of, tensors_in

_READS_DEVICE = torch.ops.prim.device.default  # autograd asks every fake tensor by this op


class StorageTracker(TorchDispatchMode):
    """Writes down, while it is entered, what happens to every storage.

    Attributes:
        events: what happened, in order.
        existing: the storages that existed before, with their sizes when first seen.
        recomputed: names of the modules whose forward backward ran again, without those inside them.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.existing: list[tuple[Record, int]] = []
        self.recomputed: list[str] = []
        self._table = StorageTable(self._on_free)
        self._modules = ModuleNames()
        self._grads_at_start: Any = WeakIdKeyDictionary()
        self._phase = "other"
        self._steps = 0  # optimizer steps that run now, one inside the other
        self._live_bytes = self._peak_bytes = 0
        self._contexts = ExitStack()
        self._active = False
        self._paused = False

    @property
    def running_module(self) -> str:
        """Name of the module that runs now."""
        return self._modules.current(None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ops in the block are not followed. Storages made there that are seen later count as older than the run."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __enter__(self) -> StorageTracker:
        self._note_gradients()
        self._thread = OwnThread()
        with ExitStack() as contexts:  # undoes what was entered if a later one fails
            contexts.enter_context(ModuleWatch(self._on_weight, self._on_enter, self._modules.exit))
            contexts.callback(torch_optimizer.register_optimizer_step_pre_hook(self._before_step).remove)
            contexts.callback(torch_optimizer.register_optimizer_step_post_hook(self._after_step).remove)
            contexts.enter_context(saved_tensors_hooks(self._on_save, self._on_release))
            super().__enter__()
            self._contexts = contexts.pop_all()
        self._active = True
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # Leaving the contexts still finds weights, but what is freed from here on is no part of the run.
        self._active = False
        self._contexts.close()
        self._table.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused or func is _READS_DEVICE:
            return func(*args, **kwargs)
        if any(is_wrapper(tensor_type) for tensor_type in types):
            for tensor in tensors_in((args, kwargs)):
                self._see(tensor, existed=True)
            return NotImplemented  # the wrapper calls the ops on its inner tensors, and those come here
        node = torch._C._current_autograd_node()
        self._phase = self._current_phase(node)
        # Tensors made outside of torch, such as torch.tensor(...) and from_numpy(...), enter by this op.
        is_new = func is torch.ops.aten.lift_fresh.default
        module = self._modules.current(node)
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, module, existed=not is_new)
        op_start = len(self.events)
        result = func(*args, **kwargs)
        is_gradient = not self._steps and is_accumulate_grad(node)
        for tensor in tensors_in(result):
            for record in self._see(tensor, module):
                if is_gradient:
                    record.claim("gradients")
        if getattr(func, "_schema", None) is None or func._schema.is_mutable:
            for tensor in tensors_in((args, kwargs)):  # resized in place
                self._see(tensor, module)
        self._update_peak(op_start, _workspace_bytes(func, args, kwargs), module)
        return result

    def _current_phase(self, node: Any) -> str:
        if self._steps:
            return "optimizer"
        if node is not None:
            return "backward"
        return "forward" if self._modules.running or torch.is_grad_enabled() else "other"

    def _see(self, tensor: Tensor, module: str = BEFORE, existed: bool = False) -> list[Record]:
        """The records of a tensor's storages, with their sizes brought up to date."""
        records = []
        for storage in storages_of(tensor):
            record = self._table.find(storage)
            if record is None:
                record = self._add(storage, module, existed)
            else:
                self._count(record)
                self._resize(record, nbytes(storage))
            records.append(record)
        return records

    def _add(self, storage: Storage, module: str, existed: bool) -> Record:
        record = self._table.add(storage)
        record.existed = existed
        record.module = BEFORE if existed else module
        if existed:
            self.existing.append((record, record.nbytes))
            record.counted = False
            self._count(record)
        else:
            self._change(record, record.nbytes)
        return record

    def _change(self, record: Record, change_bytes: int, change_handles: int = 0) -> None:
        if self._active:
            self.events.append(Event(record, change_bytes, change_handles, self._phase))
            if record.counted:
                self._live_bytes += change_bytes

    def _resize(self, record: Record, size: int) -> None:
        if size != record.nbytes:
            self._change(record, size - record.nbytes)
            record.nbytes = size

    def _count(self, record: Record) -> None:
        if not record.counted:
            record.counted = True
            self._live_bytes += record.nbytes
            self._peak_bytes += record.nbytes

    def _update_peak(self, op_start: int, workspace_bytes: int, module: str) -> None:
        if self._live_bytes + workspace_bytes <= self._peak_bytes:
            return
        # FSDP frees by resizing storages, which is no op: before a new peak is believed, all sizes are read again. What
        # has changed did so before this op.
        this_op, self.events[op_start:] = self.events[op_start:], []
        for record, storage in self._table:
            self._resize(record, nbytes(storage))
        self.events += this_op
        if workspace_bytes:
            workspace = Record(workspace_bytes)
            workspace.module = module
            self._change(workspace, workspace_bytes)
            self._peak_bytes = max(self._peak_bytes, self._live_bytes)
            self._change(workspace, -workspace_bytes)
        self._peak_bytes = max(self._peak_bytes, self._live_bytes)

    def _on_free(self, record: Record) -> None:
        self._change(record, -record.nbytes)
        record.nbytes = 0

    def _on_save(self, tensor: Tensor) -> list[Record]:
        records = self._see(tensor, existed=True)
        for record in records:
            self._change(record, 0, 1)
        return records

    def _on_release(self, records: list[Record]) -> None:
        for record in records:
            self._change(record, 0, -1)

    def _on_weight(self, module: nn.Module | None, tensor: Tensor) -> None:
        for record in self._see(tensor, existed=True):
            record.claim("weights")
        for record in self._grads_at_start.get(tensor, ()):
            self._count(record)

    def _on_enter(self, module: nn.Module) -> None:
        outermost = not self._modules.running
        self._modules.enter(module)
        if outermost and torch._C._current_autograd_node() is not None and (name := self.running_module):
            self.recomputed.append(name)

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._thread.is_here():
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._on_weight(None, parameter)
                if parameter.grad is not None:
                    for record in self._see(parameter.grad, existed=True):
                        record.claim("gradients")
        self._claim_state(optimizer)
        self._steps += 1

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._thread.is_here():
            self._steps -= 1
            self._claim_state(optimizer)

    def _claim_state(self, optimizer: torch.optim.Optimizer) -> None:
        for tensor in tensors_in(list(optimizer.state.values())):
            for record in self._see(tensor, existed=True):
                record.claim("optimizer")

    def _note_gradients(self) -> None:
        """Record the gradients that exist now: `zero_grad` frees them by no op. Counted once their owner is known."""
        tensor_types = {Tensor, *_subclasses(Tensor)}
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in gc.get_referrers(*tensor_types):  # instances refer to their class; some other objects do too
                if type(tensor) not in tensor_types or not tensor.is_leaf or tensor.grad is None:
                    continue
                self._grads_at_start[tensor] = records = []
                for storage in storages_of(tensor.grad):
                    record = self._table.find(storage)
                    if record is None:
                        record = self._add(storage, BEFORE, existed=True)
                        record.counted = False
                    record.claim("gradients")
                    records.append(record)


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in type.__subclasses__(cls):
        yield subclass
        yield from _subclasses(subclass)


def _workspace_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Bytes that an op of ours allocates and frees inside, where no dispatch mode can look."""
    if getattr(func, "namespace", None) != "memsave":
        return 0
    from .. import ops  # only a program that uses the ops needs them loaded

    return ops.workspace_bytes(func, args, kwargs)
