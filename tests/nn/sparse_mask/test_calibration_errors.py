"""Masks by gradient: what is refused, with the model as it was, and the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memsave.nn.sparse_mask import gradient_masks

from .calibrated import NAMES, Counting, Stop, data, failing, mlp, square, surroundings, weights_of


def fails(match: str, **changes: Any) -> None:
    model = mlp()
    before = surroundings(model)
    arguments: dict[str, Any] = dict(counts=dict.fromkeys(NAMES, 2), batches=data(), loss=square)
    arguments |= {"weights": weights_of(model)} | {
        name: change(model) if name == "weights" else change for name, change in changes.items()
    }
    with pytest.raises(ValueError, match=match):
        gradient_masks(model, **arguments)
    assert surroundings(model) == before


def test_bad_batches() -> None:
    fails(r"one-shot iterator \(generator\), but 3 passes are needed; give a list", batches=(x for x in data()))
    fails("one-shot iterator", batches=map(Tensor.clone, data()))
    fails("at least one batch, got none", batches=[])
    fails("expected an iterable of batches.*got Tensor", batches=data()[0])
    fails("expected an iterable of batches.*got dict", batches={"x": data()[0]})
    fails("expected an iterable of batches.*got NoneType", batches=None)

    class Tired:
        rest = iter(data())

        def __iter__(self) -> Iterator[Tensor]:
            return self.rest

    fails("at least one batch, got none", batches=Tired())

    class Shrinking(Tired):
        left = 4

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter(data(self.left))

    fails("the first pass gave 3 batches, a later one 2", batches=Shrinking())


def test_bad_losses() -> None:
    fails("Tensor.*has no .loss", loss=None)
    fails("expected a scalar tensor, got a tensor of shape", loss=lambda output: output)
    fails("expected a scalar tensor, got float", loss=lambda output: 1.0)
    fails("no batch gives a gradient to 0.weight", loss=lambda output: output.detach().sum())


def test_weights_without_a_gradient_are_named() -> None:
    model = Counting(2, 6).double()
    model.unused = nn.Linear(2, 2)
    names = ("layers.0.weight", "unused.weight", "layers.1.weight")
    with pytest.raises(ValueError, match="no batch gives a gradient to unused.weight: "):
        gradient_masks(
            model, weights_of(model, names), dict.fromkeys(names, 2), data(), loss=square, budget_bytes=10**9
        )
    assert all(p.grad is None for p in model.parameters())


def test_bad_weights_and_counts() -> None:
    fails("score: expected one of.*got 'grad'", score="grad")
    fails(r"counts: names differ.*\['4.weight'\]", counts={"0.weight": 1, "2.weight": 1})
    fails("counts: 2.weight: .*0 to 80 entries.*got 81", counts=dict.fromkeys(NAMES, 1) | {"2.weight": 81})
    fails("4.weight is not a parameter of the model", weights=lambda m: weights_of(m) | {"4.weight": nn.Parameter()})
    fails(
        "0.weight and 4.weight are the same", weights=lambda m: weights_of(m) | {"4.weight": m.get_parameter(NAMES[0])}
    )
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="w has dtype torch.uint8"):
        gradient_masks(model, {"w": model.weight}, {"w": 1}, data(), loss=square)


@pytest.mark.parametrize(("tty", "layers", "shown"), [(True, 3, True), (False, 3, False), (True, 1, False)])
def test_a_bar_where_someone_may_be_looking(
    tty: bool, layers: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Bar(list):
        closed = False

        def close(self) -> None:
            self.closed = True

    fake = ModuleType("tqdm")
    fake.tqdm = lambda groups, **_: made.append(Bar(groups)) or made[-1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", fake)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: tty, write=lambda text: None))
    model, names = mlp(), NAMES[:layers]
    gradient_masks(model, weights_of(model, names), dict.fromkeys(names, 2), data(), loss=square)
    assert [bar.closed for bar in made] == [True] * shown
    made.clear()
    with pytest.raises(Stop):
        gradient_masks(model, weights_of(model, names), dict.fromkeys(names, 2), data(), loss=failing(2))
    assert [bar.closed for bar in made] == [True] * shown


def test_no_bar_without_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True, write=lambda text: None))
    model = mlp()
    gradient_masks(model, weights_of(model), dict.fromkeys(NAMES, 2), data(), loss=square)
