"""PatchConvConfig: its settings, and the models and inputs that it refuses, which stay as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import ConversionError, Guarantee, MethodConfig, PatchConvConfig, UnsupportedModelError

from ..slicing.harness import lively
from .cnns import SIZE, Classifier, ConvBlock, Flat, assert_same, convert, counts, image, pair, run

UNCHANGED = "The model was not changed."


def test_the_settings() -> None:
    config = PatchConvConfig()
    assert config.to_dict() == {
        "method": "patch_conv",
        "schedule": "stream",
        "input_size": [1, 3, 224, 224],
        "budget_bytes": None,
        "num_patches": None,
        "split": None,
    }
    assert (config.guarantee, config.scope, config.default, config.calibrated) == (
        Guarantee.EXACT,
        "model",
        False,
        False,
    )
    assert PatchConvConfig(input_size=None).calibrated
    assert str(config) == "PatchConvConfig(schedule='stream', input_size=(1, 3, 224, 224))"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"schedule": "patch", "input_size": torch.Size((2, 1, 9, 7)), "num_patches": 2, "split": "a.b"},
        {"input_size": None, "budget_bytes": 1},
        {"input_size": [1, 3, 5]},
    ],
)
def test_settings_round_trip_through_json(settings: dict[str, Any]) -> None:
    config = PatchConvConfig(**settings)
    again = MethodConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)
    assert json.loads(config.to_json())["method"] == "patch_conv"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "tile"}, r"schedule: expected one of \['stream', 'patch'\], got 'tile'"),
        ({"schedule": None}, r"schedule: expected one of .*, got None"),
        ({"input_size": (3, 224)}, r"input_size: expected a shape with batch and channels first.*got \(3, 224\)"),
        ({"input_size": 224}, r"input_size: .* or None, got 224"),
        ({"input_size": (1, 3, 0, 8)}, r"input_size: .*got \(1, 3, 0, 8\)"),
        ({"input_size": (1, 3, 8.0, 8)}, r"input_size: .*got \(1, 3, 8.0, 8\)"),
        ({"input_size": (True, 3, 8, 8)}, r"input_size: .*got \(True, 3, 8, 8\)"),
        ({"input_size": "1388"}, r"input_size: .*got '1388'"),
        ({"budget_bytes": 0}, "budget_bytes: expected a whole number of at least 1 or None, got 0"),
        ({"budget_bytes": 1e6}, "budget_bytes: expected a whole number of at least 1 or None, got 1000000.0"),
        ({"num_patches": 1}, "num_patches: expected a whole number of at least 2 or None, got 1"),
        ({"num_patches": True}, "num_patches: .*got True"),
        ({"split": ""}, "split: expected the name of a module or None, got ''"),
        ({"split": 3}, "split: expected the name of a module or None, got 3"),
    ],
)
def test_settings_outside_their_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"PatchConvConfig.{message}"):
        PatchConvConfig(**settings)


def refusal(model: nn.Module, **settings: Any) -> str:
    """The message of the refusal, without the config."""
    with pytest.raises(UnsupportedModelError) as raised:
        convert(model, **settings)
    message = str(raised.value)
    assert message.endswith(UNCHANGED) and message.startswith("PatchConvConfig(schedule='stream', ")
    return message.partition("): ")[2] if "): " in message else message


def test_models_in_training_mode(unchanged: Any) -> None:
    plain, _ = pair()
    plain.features.block.train()
    message = refusal(unchanged(plain))
    assert message.startswith("features.block is in training mode, and plans are for inference; call model.eval()")
    plain, _ = pair()
    assert refusal(unchanged(plain.train())).startswith("it is in training mode")


class Chooses(Flat):
    """Its control flow depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class Counts(Flat):
    """Changes a buffer in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x) * self.calls


class Remembers(Flat):
    """Keeps a map in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.first(x)
        return super().forward(x)


class Collects(Flat):
    """Keeps a map in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.maps.append(self.first(x))
        return self.head(self.second(self.maps[-1])).mean((2, 3))


class Paints(Flat):
    """Writes into its argument, which the caller sees."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Chooses, "torch.export cannot trace Chooses: .*data-dependent"),
        (Counts, "its forward changes b_calls in place, which is read elsewhere, at the model itself"),
        (Remembers, "the forward of Remembers keeps something of each call in last"),
        (Collects, "the forward of Collects keeps something of each call in maps"),
        (Paints, "its forward changes x in place"),
    ],
)
def test_forwards_that_a_graph_does_not_tell_all_of(make: Callable[[], nn.Module], reason: str, unchanged: Any) -> None:
    import re

    model = unchanged(lively(make()))
    message = refusal(model)
    assert re.search(reason, message, re.IGNORECASE), message


def test_norms_by_the_statistics_of_the_batch() -> None:
    plain = lively(Flat())
    norm = nn.BatchNorm2d(8, track_running_stats=False).eval()
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    plain.second.norm = norm
    model = copy.deepcopy(plain)
    convert(model)
    named = [reason for where, reason in memsave.patch_plans(model)[0].ends.items() if where.startswith("second.norm")]
    assert named or memsave.patch_plans(model)[0].stages[0].how != "whole"
    for x in (image(), image(3, 3, 40, 40)):
        assert_same(model, plain, x)
    assert counts(model) == {"planned": 2}


def test_a_forward_that_was_replaced(unchanged: Any) -> None:
    plain, _ = pair()
    act = plain.features.stem.act
    act.forward = torch.tanh
    assert refusal(unchanged(plain)).startswith("the forward of features.stem.act was replaced on the instance")
    assert act.forward is torch.tanh
    _, planned = pair()
    planned.features.block.excite.forward = lambda x: x
    with pytest.raises(memsave.RestoreError, match="the forward of features.block.excite was replaced since; undo"):
        memsave.restore_model(planned)
    assert len(memsave.patch_plans(planned)) == 1
    del planned.features.block.excite.forward
    memsave.restore_model(planned)
    assert memsave.patch_plans(planned) == []


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((1, 4, 40, 40), r"torch.export cannot trace Classifier: .*expected input.* to have 3 channels, but got 4"),
        ((1, 3, 40), r"torch.export cannot trace Classifier: .*"),
        ((1, 3, 4, 40, 40), r"torch.export cannot trace Classifier: .*conv2d.*"),
    ],
)
def test_inputs_that_the_model_does_not_take(size: Any, reason: str, unchanged: Any) -> None:
    import re

    plain, _ = pair()
    message = refusal(unchanged(plain), input_size=size)
    assert re.search(reason, message), message


def test_a_missing_argument_is_named(unchanged: Any) -> None:
    class Two(Flat):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return super().forward(x + other)

    assert "missing" in refusal(unchanged(lively(Two())))
    with pytest.raises(ValueError, match="calibration: expected a batch to plan for, got none"):
        memsave.convert_model(unchanged(lively(Two())), PatchConvConfig(input_size=None), calibration=[])


@pytest.mark.parametrize("parts", [None, 4])
def test_a_single_linear(parts: int | None, unchanged: Any) -> None:
    message = refusal(unchanged(nn.Linear(8, 4).eval()), input_size=(1, 3, 8), num_patches=parts)
    assert "part by part" in message


def test_small_maps_are_left_whole_unless_wished(unchanged: Any) -> None:
    plain, _ = pair()
    message = refusal(unchanged(plain), num_patches=None, input_size=(1, 3, 8, 8))
    assert message.startswith("nothing in it needs less memory when it is computed part by part, within the allowed")


def test_a_split_that_is_no_module(unchanged: Any) -> None:
    plain, _ = pair()
    assert refusal(unchanged(plain), split="features.nowhere").startswith(
        "split: no op belongs to a module 'features.nowhere'"
    )


class DistributedDataParallel(nn.Module):
    """Named as torch's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (DistributedDataParallel, "DistributedDataParallel"),
        (lambda m: torch.compile(m, backend="eager"), "OptimizedModule"),
    ],
)
def test_wrapped_models(wrap: Any, name: str, inside: bool, unchanged: Any) -> None:
    plain, _ = pair()
    wrapped = wrap(plain).eval()
    model = nn.Sequential(wrapped).eval() if inside else wrapped
    with pytest.raises(UnsupportedModelError, match=f"is wrapped in {name}: convert, .*{UNCHANGED}"):
        convert(unchanged(model))


def test_two_settings_at_once(unchanged: Any) -> None:
    plain, _ = pair()
    configs = [PatchConvConfig(input_size=SIZE, num_patches=n) for n in (3, 4)]
    with pytest.raises((memsave.ConflictError, ConversionError), match="were both asked for; leave one of them out"):
        memsave.convert_model(unchanged(plain), configs)


def test_an_error_in_another_method_takes_the_plan_off_again(unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = lively(nn.Sequential(Classifier(), nn.LayerNorm(5)))
    monkeypatch.setattr(memsave.RecomputeNormConfig, "convert", lambda config, module: 1 / 0)
    configs = [PatchConvConfig(input_size=SIZE, num_patches=4), memsave.RecomputeNormConfig()]
    with pytest.raises(ZeroDivisionError):
        memsave.convert_model(unchanged(plain), configs)
    run(plain, image())
    assert memsave.patch_plans(plain) == []


def test_a_part_of_a_model_that_is_converted_on_its_own() -> None:
    plain, planned = pair()
    inner = copy.deepcopy(plain)
    convert(inner.features)
    assert [plan.module for plan in memsave.patch_plans(inner)] == [""]
    around = nn.Sequential(inner, nn.Identity()).eval()
    assert_same(around, nn.Sequential(plain, nn.Identity()))
    memsave.restore_model(around)
    assert memsave.patch_plans(around) == [] and not any("forward" in m.__dict__ for m in around.modules())


def test_blocks_that_are_planned_alike() -> None:
    plain = lively(nn.Sequential(ConvBlock(3, 8), ConvBlock(8, 3)))
    models = [copy.deepcopy(plain) for _ in range(2)]
    for model, schedule in zip(models, ("stream", "patch"), strict=True):
        convert(model, schedule)
        assert_same(model, plain)
        assert counts(model) == {"planned": 1}
