"""Optimizers that were made before a conversion gave the model other parameters, noticed in plain loops."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import memsave
from memsave import FlashSVDConfig, RoutedFFNConfig, WTACRSConfig, optimizers

D, HIDDEN = 8, 16
ROUTED = RoutedFFNConfig(target_modules=["ffn"])
LOW_RANK = FlashSVDConfig(ratio=0.5, target_modules=r"ffn\..*")
MISSED = "2 parameters, ffn.router.weight first, that get gradients and that no optimizer trains: SGD was made before"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.ffn = nn.Sequential(nn.Linear(D, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, D))
        self.head = nn.Linear(D, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.ffn(self.norm(x))).square().mean()


def step(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    model(torch.randn(32, D)).backward()
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.01)


@pytest.fixture(autouse=True)
def no_other_warnings() -> Any:
    optimizers._watches.clear()  # those of earlier tests
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    optimizers._watches.clear()


def test_parameters_that_are_gone_stop_the_first_step() -> None:
    model = Model()
    optimizer = sgd(model.parameters())
    memsave.convert_model(model, LOW_RANK)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(memsave.MemsaveError, match="took 2 of the parameters that SGD holds.*convert first.*not made"):
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    late = sgd(model.parameters())
    step(model, late), step(model, late)
    assert not optimizers._watches


def test_parameters_that_nobody_trains_are_named_once() -> None:
    model = Model()
    optimizer = sgd(model.parameters())
    memsave.convert_model(model, ROUTED)
    step(model, optimizer)
    with pytest.warns(UserWarning, match=MISSED):
        step(model, optimizer)
    step(model, optimizer)


def test_what_is_trained_is_no_reason_to_warn() -> None:
    others = []
    for made in ("after", "two", "group", "frozen", "other"):
        model = Model()
        early = sgd(model.parameters())
        memsave.convert_model(model, ROUTED)
        found = [early]
        if made == "after":
            found = [sgd(model.parameters())]
        elif made == "two":
            found.append(sgd(model.ffn.router.parameters()))
        elif made == "group":
            early.add_param_group({"params": list(model.ffn.router.parameters())})
        elif made == "frozen":
            model.ffn.router.requires_grad_(False)
        else:
            model(torch.randn(32, D)).backward()  # it has gradients, and lives on
            others.append(model)
            model = Model()
            found = [sgd(model.parameters())]
        for _ in range(3):
            step(model, *found)
        optimizers._watches.clear()


def test_the_first_of_two_optimizers_to_step_does_not_know_the_second_yet() -> None:
    model = Model()
    early = [sgd(model.ffn.parameters()), sgd(model.head.parameters())]
    memsave.convert_model(model, ROUTED)
    step(model, *early)
    with pytest.warns(UserWarning, match=MISSED):
        step(model, *early)


@pytest.mark.parametrize("config", [ROUTED, LOW_RANK])
def test_a_model_that_was_restored_in_between(config: Any) -> None:
    model = Model()
    optimizer = sgd(model.parameters())
    memsave.convert_model(model, config)
    if config is ROUTED:
        memsave.restore_model(model, allow_lossy=True)
        step(model, optimizer), step(model, optimizer)
    else:  # its dense equivalent is another parameter
        memsave.restore_model(model, allow_lossy=True)
        with pytest.raises(memsave.MemsaveError, match="took 2 of the parameters"):
            step(model, optimizer)


def test_methods_that_leave_the_parameters_are_not_watched() -> None:
    model = Model()
    memsave.convert_model(model)
    memsave.convert_model(model, WTACRSConfig(target_modules=["head"]))
    memsave.convert_model(model, ROUTED, dry_run=True)
    assert not optimizers._watches


def test_nothing_is_kept_alive() -> None:
    model = Model()
    gone = weakref.ref(model.ffn[0].weight)
    memsave.convert_model(model, LOW_RANK)
    assert gone() is None and len(optimizers._watches) == 1
    model_reference, router = weakref.ref(model), weakref.ref(next(iter(model.parameters())))
    del model
    gc.collect()
    assert model_reference() is None and router() is None
    other = nn.Linear(2, 1)
    other(torch.ones(1, 2)).sum().backward()
    sgd(other.parameters()).step()
    assert not optimizers._watches
