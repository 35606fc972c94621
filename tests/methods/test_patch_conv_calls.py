"""PatchConvConfig: which calls run by a plan, and that all others are the plain model's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import memsave
from memsave import PatchConvConfig

from ..slicing.harness import lively
from ..snapshot import snapshot
from .cnns import SCHEDULES, SIZE, Classifier, ConvBlock, Flat, assert_same, convert, counts, error, image, pair, run

GRADIENTS = "gradients are enabled"
TRAINING = "a module is in training mode"
HOOKS = "hooks watch a module within"
OTHER = "it was called with other arguments than planned"
TRANSFORM = "a transform of torch.func or forward-mode AD is active"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_the_plain_models_and_are_warned_of_once(schedule: str) -> None:
    plain, planned = pair(schedule=schedule)
    x = image().requires_grad_()
    with pytest.warns(UserWarning, match="features runs without its plan while gradients are enabled") as caught:
        found = [planned(x) for _ in range(2)]
    assert len(caught) == 1
    assert torch.equal(found[1], plain(x))
    wanted = [x, *planned.parameters()]
    ours = torch.autograd.grad(found[1].square().sum(), wanted)
    theirs = torch.autograd.grad(plain(x).square().sum(), [x, *plain.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counts(planned) == {GRADIENTS: 2}
    assert_same(planned, plain, x)
    assert counts(planned) == {GRADIENTS: 2, "planned": 1}


def test_frozen_models_need_no_context() -> None:
    plain, planned = pair()
    for model in (plain, planned):
        model.requires_grad_(False)
    assert error(planned(image()), plain(image())) <= 1e-5
    assert counts(planned) == {"planned": 1}
    with pytest.warns(UserWarning, match="gradients are enabled"):
        planned(image().requires_grad_()).sum().backward()
    assert counts(planned) == {"planned": 1, GRADIENTS: 1}


def _train(model: Any) -> Callable[[], object]:
    model.features.block.second.norm.train()
    return model.eval


def _train_all(model: Any) -> Callable[[], object]:
    model.train()
    return model.eval


def _hook(model: Any) -> Callable[[], object]:
    return model.features.block.register_forward_hook(lambda m, args, output: output * 3).remove


def _pre_hook(model: Any) -> Callable[[], object]:
    return model.features.down.conv.register_forward_pre_hook(lambda m, args: (args[0] + 1,)).remove


def _replace(model: Any) -> Callable[[], object]:
    act = model.features.stem.act
    act.forward = lambda x: x.abs()
    return lambda: act.__dict__.pop("forward")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_train, TRAINING),
        (_train_all, TRAINING),
        (_hook, HOOKS),
        (_pre_hook, HOOKS),
        (_replace, "the forward of a module within was replaced"),
    ],
)
def test_a_model_that_is_watched_or_trained_runs_plainly_until_it_is_not(change: Any, reason: str) -> None:
    plain, planned = pair()
    undo = [change(model) for model in (plain, planned)]
    before = plain.features.block.second.norm.num_batches_tracked.item()
    expected = run(plain, image())
    assert torch.equal(run(planned, image()), expected)
    assert counts(planned) == {reason: 1}
    norms = [m.features.block.second.norm for m in (plain, planned)]
    assert torch.equal(norms[0].running_mean, norms[1].running_mean)
    assert norms[1].num_batches_tracked.item() == before + (reason == TRAINING)
    for revert in undo:
        revert()
    assert_same(planned, plain)
    assert counts(planned) == {reason: 1, "planned": 1}


def test_a_hook_sees_what_it_would_see_in_the_plain_model() -> None:
    plain, planned = pair()
    seen: list[list[Tensor]] = [[], []]
    for model, found in zip((plain, planned), seen, strict=True):
        model.features.block.first.conv.register_forward_hook(lambda m, args, output, f=found: f.append(output))
        run(model, image())
    (theirs,), (ours,) = seen
    assert torch.equal(ours, theirs)


def test_hooks_are_not_called_for_planning() -> None:
    plain = lively(Classifier())
    called: list[Any] = []
    for module in (plain, plain.features, plain.features.stem.conv, plain.head):
        module.register_forward_pre_hook(lambda m, args: called.append(args))
        module.register_forward_hook(lambda m, args, output: output.numpy() and None)  # fakes have none
    convert(plain)
    assert called == []


class TakesMore(Flat):
    """With arguments besides the image."""

    def forward(self, x: Tensor, scale: float = 1.0, *, flip: bool = False, bias: Tensor | None = None) -> Tensor:
        y = super().forward(x.flip(3) if flip else x) * scale
        return y if bias is None else y + bias


def test_other_arguments_run_plainly() -> None:
    plain = lively(TakesMore())
    planned, calls = lively(TakesMore()), 0
    planned.load_state_dict(plain.state_dict())
    convert(planned)
    x = image()
    others: list[dict[str, Any]] = [
        {"scale": 2.0},
        {"flip": True},
        {"bias": torch.arange(4.0)},
        {"flip": False},
    ]
    for kwargs in others:
        calls += 1
        assert torch.equal(run(planned, x, **kwargs), run(plain, x, **kwargs))
        assert counts(planned) == {OTHER: calls}
    assert torch.equal(run(planned, x=x), run(plain, x=x))
    assert_same(planned, plain)
    assert counts(planned) == {OTHER: calls + 1, "planned": 1}


def test_arguments_that_were_planned_with_are_told_apart() -> None:
    plain = lively(TakesMore())
    planned = lively(TakesMore())
    planned.load_state_dict(plain.state_dict())
    config = PatchConvConfig(input_size=None, num_patches=4)
    bias = torch.arange(4.0)
    memsave.convert_model(planned, config, calibration=[{"x": image(), "scale": 2.0, "bias": bias}])
    for kwargs in ({"scale": 2.0, "bias": bias}, {"scale": 2.0, "bias": -bias}, {"scale": 3.0, "bias": bias}):
        assert error(run(planned, x=image(), **kwargs), run(plain, x=image(), **kwargs)) <= 1e-5
    assert counts(planned) == {"planned": 2, OTHER: 1}


class OwnTensor(Tensor):
    """A subclass that remembers what is done to it."""

    ops: list[str] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.ops.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensors_of_other_classes_run_plainly() -> None:
    plain, planned = pair()
    x = image().as_subclass(OwnTensor)
    OwnTensor.ops.clear()
    found = run(planned, x)
    assert type(found) is OwnTensor and "conv2d" in OwnTensor.ops
    assert torch.equal(found.as_subclass(Tensor), run(plain, image()))
    assert counts(planned) == {"an argument is a tensor of another class": 1}


def test_autocast_runs_plainly() -> None:
    plain, planned = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = run(planned, image()), run(plain, image())
    assert found.dtype is torch.bfloat16 and torch.equal(found, expected)
    assert counts(planned) == {"autocast is enabled": 1}
    with torch.autocast("cpu", enabled=False):
        assert_same(planned, plain)
    assert counts(planned) == {"autocast is enabled": 1, "planned": 1}


def test_transforms_run_plainly() -> None:
    plain, planned = pair(Flat)
    x, direction = image(), image().flip(2)
    many = image(4, *SIZE)
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(planned)(many), torch.func.vmap(plain)(many))
        for a, b in zip(*(torch.func.jvp(m, (x,), (direction,)) for m in (planned, plain)), strict=True):
            assert torch.equal(a, b)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, direction)
            found, expected = (forward_ad.unpack_dual(m(dual)) for m in (planned, plain))
            assert torch.equal(found.tangent, expected.tangent)
    assert counts(planned) == {TRANSFORM: 3}


def test_functional_call_with_other_weights() -> None:
    plain, planned = pair()
    weights = {name: p.detach() * 1.5 for name, p in planned.named_parameters()}
    with torch.no_grad():
        found, expected = (torch.func.functional_call(m, weights, (image(),)) for m in (planned, plain))
    assert error(found, expected) <= 1e-5
    assert counts(planned) == {"planned": 1}
    wide = {name: p.double() for name, p in weights.items()}
    wide |= {n: b.double() for n, b in planned.named_buffers() if b.is_floating_point()}
    with torch.no_grad():
        found, expected = (torch.func.functional_call(m, wide, (image(dtype=torch.float64),)) for m in (planned, plain))
    assert error(found, expected) <= 1e-12
    for model in (planned, plain):
        model.double()
    assert_same(planned, plain, image(dtype=torch.float64))
    assert counts(planned)["planned"] == 2


@pytest.mark.parametrize("inner", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_without_gradients_in_either_way(
    outer: Callable[[], AbstractContextManager[None]], inner: Callable[[], AbstractContextManager[None]]
) -> None:
    plain, planned = pair()
    with outer():  # planned in it
        x = image(1, 3, 33, 40)
        assert error(planned(x), plain(x)) <= 1e-5
    with inner():
        assert error(planned(x), plain(x)) <= 1e-5
    assert counts(planned) == {"planned": 2}


@pytest.mark.parametrize("where", ["features", ""])
def test_a_model_within_another_and_called_on_its_own(where: str) -> None:
    plain, planned = pair()
    a, b = (m.get_submodule(where) for m in (planned, plain))
    assert_same(a, b)
    around = [nn.Sequential(nn.Identity(), m) for m in (a, b)]
    assert_same(*around)
    assert counts(planned) == {"planned": 2}


class Twice(nn.Module):
    """Calls one module twice, so that it cannot be planned on its own, and holds another under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBlock(3, 8), ConvBlock(8, 3))
        self.again = self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.body(x) + self.body(x.flip(2)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_modules_that_are_called_twice(schedule: str) -> None:
    plain, planned = lively(Twice()), lively(Twice())
    planned.load_state_dict(plain.state_dict())
    before = snapshot(planned)
    convert(planned, schedule)
    assert snapshot(planned)["parameters"] == before["parameters"]
    assert [plan.module for plan in memsave.patch_plans(planned)] == [""]
    assert_same(planned, plain)
    for model in (plain, planned):
        model.again.conv.weight.data.mul_(2)
    assert_same(planned, plain)
    assert counts(planned) == {"planned": 2}


def test_sizes_that_cannot_be_planned_are_warned_of_once_and_run_plainly() -> None:
    class Rows(Flat):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] == 24 and bool(x.sum() > -1e9):  # the trace cannot follow
                x = x + 1
            return super().forward(x)

    plain = lively(Rows())
    planned = lively(Rows())
    planned.load_state_dict(plain.state_dict())
    convert(planned)
    x = image(1, 3, 24, 40)
    with pytest.warns(UserWarning, match="no plan for these shapes: torch.export cannot trace Rows.*it runs plainly"):
        assert_same(planned, plain, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(planned, plain, x)
        assert_same(planned, plain)
    reason, planned_calls = counts(planned).items()
    assert reason[0].startswith("no plan for these shapes: torch.export cannot trace Rows") and reason[1] == 2
    assert planned_calls == ("planned", 1)
