"""A tracker that also remembers what each storage is: the shape, the dtype, when it was made, and who keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .modules import BEFORE
from .replay import State, counted
from .storages import Record
from .tracker import StorageTracker


class Origin(NamedTuple):
    """The first tensor that was seen on a storage, and the phase in which it was made."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    phase: str


class Save(NamedTuple):
    """One tensor kept for backward: its storage, and the module that ran when autograd was given it."""

    record: Record
    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class NotingTracker(StorageTracker):
    """Writes down, while it is entered, what happens to every storage, and what each is.

    Attributes:
        origins: of every storage that was seen.
        saves: what was kept for backward, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[Record, Origin] = {}
        self.saves: list[Save] = []

    def _see(self, tensor: Tensor, module: str = BEFORE, existed: bool = False) -> list[Record]:
        records = super()._see(tensor, module, existed)
        for record in records:
            if record not in self.origins:
                self.origins[record] = Origin(tuple(tensor.shape), tensor.dtype, self._phase)
        return records

    def _on_save(self, tensor: Tensor) -> list[Record]:
        records = super()._on_save(tensor)
        module = self.running_module
        self.saves += [Save(record, module, tuple(tensor.shape), tensor.dtype) for record in records]
        return records

    def state_when_most(self, amount: Callable[[State], int]) -> State:
        """The state at the first moment at which `amount` was largest."""
        existing, events = counted(self.existing, self.events)
        state = State(existing)
        most, last = amount(state), 0
        for number, event in enumerate(events, start=1):
            state.apply(event)
            if amount(state) > most:
                most, last = amount(state), number
        state = State(existing)
        for event in events[:last]:
            state.apply(event)
        return state

    def kept_at_most(self) -> dict[Record, int]:
        """The storages that are kept for backward when most is, with their bytes; weights are not among them."""
        state = self.state_when_most(lambda state: state.kept_bytes)
        kept = ((record, state.sizes[record]) for record, handles in state.handles.items() if handles > 0)
        return {record: size for record, size in kept if size and record.role != "weights"}

    def live_at_peak(self) -> dict[Record, int]:
        """The storages that are live at the peak, with their bytes."""
        state = self.state_when_most(lambda state: sum(state.live_bytes.values()))
        return {record: size for record, size in state.sizes.items() if size}
