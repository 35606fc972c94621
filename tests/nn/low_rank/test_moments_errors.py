"""Second moments: what is refused, with the model as it was, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave.nn.low_rank.moments import second_moments

from .collecting import GROUPS, NAMES, Attention, Calls, Experts, attention, collected, data, part, surroundings


def fails(
    match: str, model: nn.Module | None = None, names: tuple[str, ...] = NAMES, used: int = 0, **changes: Any
) -> None:
    model = attention() if model is None else model
    before, calls = surroundings(model), []
    arguments: dict[str, Any] = {"modules": part(model, names), "batches": data()} | changes
    with pytest.raises(ValueError, match=match):
        second_moments(model, use=lambda *args: calls.append(args), **arguments)
    if isinstance(model, Attention):
        model.calls.clear()
    assert surroundings(model) == before and len(calls) == used


def test_bad_batches() -> None:
    fails(r"one-shot iterator \(generator\), but 2 passes are needed; give a list", batches=(x for x in data()))
    fails("at least one batch, got none", batches=[])
    fails("expected an iterable of batches.*got Tensor", batches=data()[0])
    fails("expected an iterable of batches.*got dict", batches={"x": data()[0]})
    fails("expected an iterable of batches.*got NoneType", batches=None)

    class Shrinking:
        left = 4

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter(data(self.left))

    fails("the first pass gave 3 batches, a later one 2", batches=Shrinking(), used=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e200])
def test_inputs_that_are_not_finite(value: float) -> None:
    batches = data()
    batches[1][0, 2, 3] = value
    model = attention()
    fails("in batch 1 .the first is 0. the input of q is not finite", model, NAMES[1:], batches=batches)


def test_modules_out_of_reach() -> None:
    model = attention()
    model.spare = nn.Linear(2, 2)
    for budget_bytes in (0, 10**9):
        fails("no batch reaches spare; expected", model, (*NAMES, "spare"), budget_bytes=budget_bytes)
    experts = Experts().double()
    fails("no batch reaches b;", experts, ("a", "b"), batches=[torch.ones(1, 3).double()])
    fails("no batch reaches a, b;", experts, ("a", "b"), batches=[torch.zeros(1, 3).double()])
    empty = nn.Sequential(nn.Linear(3, 2))
    fails("no batch reaches 0;", empty, ("0",), batches=[torch.ones(0, 3)])
    fails("modules: q, other: not a part", modules={"q": attention().q, "other": nn.Linear(2, 2)})


def test_bad_inputs() -> None:
    fails("embed: expected .* one floating-point tensor, got torch.int64", Embedding(), ("embed",), batches=[ids()])
    fails("inner: expected .*got torch.float32, torch.float32", Two(), ("inner",), batches=[torch.ones(2, 2)])


def ids() -> Tensor:
    return torch.tensor([[1, 2]])


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Bilinear(2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x)


def test_inputs_that_are_shared_at_first_only() -> None:
    model = Calls(lambda a, b, x: (a(x), b(x if bool(x[0, 0] == 0) else x + 1))).double()
    batches = [torch.full((1, 3), float(i)).double() for i in (0, 1)]
    fails("a, b read the same tensors in batch 0, but not in batch 1; give this", model, ("a", "b"), batches=batches)
    assert list(collected(model, part(model, ("a", "b")), batches[::-1])) == [("a",), ("b",)]


def test_a_model_or_a_use_that_raises() -> None:
    def broken(*_: Any) -> None:
        raise KeyError("stop")

    model = attention()
    before = surroundings(model)
    with pytest.raises(KeyError, match="stop"):
        second_moments(model, part(model), data(), broken)
    with pytest.raises(RuntimeError):
        second_moments(model, part(model), [*data(), torch.ones(2, 5, 3).double()], broken)
    model.calls.clear()
    assert surroundings(model) == before


def test_no_modules_need_no_batches() -> None:
    assert collected(attention(), {}, []) == {}


@pytest.mark.parametrize(("tty", "count", "shown"), [(True, 3, 4), (False, 3, 0), (True, 1, 0)])
def test_a_bar_where_someone_may_be_looking(tty: bool, count: int, shown: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Bar:
        closed = False

        def __init__(self, items: Any, *, desc: str, total: int, delay: float, **_: Any) -> None:
            assert total == count and delay == 2.0 and desc.endswith(f"pass {len(made) + 1} of 4")
            self.items = items
            made.append(self)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.items)

        def close(self) -> None:
            self.closed = True

    fake = ModuleType("tqdm")
    fake.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: tty, write=lambda text: None))
    model = attention()
    found = collected(model, part(model), data(count), budget_bytes=0)
    assert [bar.closed for bar in made] == [True] * shown and list(found) == GROUPS
