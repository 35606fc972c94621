"""Forwards that write in place, and others that change more than they return."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memsave.slicing.errors import CannotTrace
from tests.slicing.harness import ROWS, Subject, check, lively
from tests.slicing.modules import f


class WritesIntoView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :2].add_(1)
        return y + 1


class WritesIntoInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + 1


class WritesIntoRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, :, 1:3] = 0
        return y


class WritesWhatAViewReads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y[:, :, 1:]
        y.add_(1)
        return view * 3


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


@pytest.mark.parametrize("kind", [WritesIntoView, WritesIntoInput, WritesIntoRows, WritesWhatAViewReads, Counts])
def test_writes_that_cannot_be_undone(kind: type[nn.Module]) -> None:
    with pytest.raises(CannotTrace):
        Subject.of(kind().eval(), torch.randn(1, 4, 8, 8))


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(x))
        y += 1
        y.add_(x).mul_(0.5)
        z = y.clone()
        z.sub_(y.mean((2, 3), keepdim=True))
        return self.relu(z) + y


class FillsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.clamp_(-1, 1).masked_fill_(x > 1, 3)
        return F.silu(y, inplace=True)


class AddsWiderInPlace(nn.Module):
    """The sum keeps the dtype of what is written, though it is computed in another."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).bfloat16()
        y.add_(x.float())
        return y


IN_PLACE = {
    "inplace=True": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Hardswish(True)
    ),
    "bottleneck": AddsInPlace,
    "fills": FillsInPlace,
    "wider": AddsWiderInPlace,
}


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_writes_in_place(make: Callable[[], nn.Module]) -> None:
    subject = Subject.of(lively(make().double()), torch.randn(2, 4, 11, 9, dtype=torch.float64))
    check(subject, (0,), rows=ROWS)
    check(subject, (0, 1), tiles=[(2, 2), (3, 1)])


def test_dropout_that_is_always_on_is_no_identity() -> None:
    """In evaluation it would otherwise silently vanish."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3), f(lambda x: F.dropout(x, 0.5, training=True)))
    try:
        subject = Subject.of(module.eval(), torch.randn(1, 4, 32, 32))
    except CannotTrace:
        return
    (found,) = subject.run(subject.stretch((0,), rows=2))
    assert 0.3 < float((found == 0).double().mean()) < 0.7
