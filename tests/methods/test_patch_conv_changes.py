"""PatchConvConfig: what is changed in a planned model, values or modules, counts from the next call on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ..slicing.harness import lively
from .cnns import (
    SCHEDULES,
    Classifier,
    ConvBlock,
    Flat,
    assert_same,
    convert,
    counts,
    error,
    image,
    pair,
    run,
)

schedules = pytest.mark.parametrize("schedule", SCHEDULES)
both = pytest.mark.parametrize("make", [Classifier, Flat])


def _by_state_dict(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _by_data(model: Any) -> None:
    for p in model.parameters():
        p.data.mul_(-1.25)


def _by_optimizer(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).square().mean().backward()
    optimizer.step()
    model.zero_grad()


def _by_new_parameters(model: Any) -> None:
    model.features.stem.conv.weight = nn.Parameter(model.features.stem.conv.weight.detach().flip(2) * 3)


def _by_statistics(model: Any) -> None:
    model.features.block.first.norm.running_mean = model.features.block.first.norm.running_mean + 3
    model.features.block.second.norm.running_var.mul_(0.3)


@schedules
@pytest.mark.filterwarnings("ignore:.*gradients are enabled")
@pytest.mark.parametrize(
    "change", [_by_state_dict, _by_data, _by_optimizer, _by_new_parameters, _by_statistics], ids=lambda f: f.__name__
)
def test_the_next_call_uses_changed_values(schedule: str, change: Callable[[Any], None]) -> None:
    plain, planned = pair(schedule=schedule)
    assert_same(planned, plain)
    before = run(plain, image())
    for model in (plain, planned):
        change(model)
    assert error(run(plain, image()), before) > 1e-2  # the change matters
    assert_same(planned, plain)
    assert counts(planned)["planned"] == 2


@schedules
@both
def test_another_dtype(schedule: str, make: Any) -> None:
    plain, planned = pair(make, schedule)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        plain.to(dtype), planned.to(dtype)
        assert_same(planned, plain, image(dtype=dtype))
    assert counts(planned) == {"planned": 3}
    planned.double()
    with pytest.raises(RuntimeError, match="(?i)type"):  # the plain model's error
        run(planned, image())


def _conv(model: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.features.stem.conv = lively(nn.Conv2d(3, 8, 3, 1, 2, dilation=2, bias=False))  # the weight fits the plan
        model.features.stem.conv.weight.data.mul_(5)


def _block(model: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model.features.block = nn.Sequential(lively(ConvBlock(8, 8)), nn.MaxPool2d(3, 1, 1)).eval()


def _bias(model: Any) -> None:
    model.features.stem.conv.bias = nn.Parameter(torch.arange(8.0))


def _setting(model: Any) -> None:
    model.features.stem.norm.eps = 2.0


def _kernel(model: Any) -> None:
    model.features.down.conv.dilation = (2, 2)


def _class(model: Any) -> None:
    model.features.stem.act.__class__ = nn.SELU
    model.features.stem.act.inplace = False


def _unused(model: Any) -> None:
    model.features.block.excite = nn.Identity().eval()


def _parametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.features.stem.conv)
    model.features.stem.conv.parametrizations.weight.original0.data.mul_(2)
    model.eval()


CHANGES = [_conv, _block, _bias, _setting, _kernel, _class, _unused, _parametrized]


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_modules_and_settings_are_noticed(change: Callable[[Any], None], copied: bool) -> None:
    plain, planned = pair()
    assert_same(planned, plain)
    before = run(plain, image())
    planned = copy.deepcopy(planned) if copied else planned
    for model in (plain, planned):
        change(model)
    assert error(run(plain, image()), before) > 1e-2
    assert_same(planned, plain)
    assert "planned" in counts(planned)


def test_a_bias_that_is_taken_away() -> None:
    plain, planned = pair()
    for model in (plain, planned):
        model.features.block.excite.up.bias = None
    assert_same(planned, plain)


class HasAConstant(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([1.5])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


def test_tensors_that_are_no_parameters() -> None:
    plain = lively(HasAConstant())
    planned = copy.deepcopy(plain)
    convert(planned)
    assert_same(planned, plain)
    for model in (plain, planned):
        model.scale.mul_(2)
    assert_same(planned, plain)
    for model in (plain, planned):
        model.scale = torch.tensor([7.0])
    assert_same(planned, plain)
    assert counts(planned) == {"planned": 3}
