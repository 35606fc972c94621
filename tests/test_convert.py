"""convert_model: what is chosen, what is refused and in which words, and that a refusal changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import memsave
from memsave import (
    ConflictError,
    ConversionError,
    NoMatchError,
    RecomputeNormConfig,
    UnsupportedModelError,
    WTACRSConfig,
    convert_model,
)
from memsave.config import applied_configs

from .mlp import MLP, Unchanged, make, wta
from .snapshot import snapshot
from .toys import (
    ToyAdapterConfig,
    ToyKeepCrsConfig,
    ToyKeepPpsAgainConfig,
    ToyKeepPpsConfig,
    ToyLowRankConfig,
    ToyRootConfig,
)


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if applied_configs(module)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (r".*", ["1.up_proj", "1.down_proj", "2.up_proj", "2.down_proj"]),
        (r".*\.(up|down)_proj", ["1.up_proj", "1.down_proj", "2.up_proj", "2.down_proj"]),
        (r"2\..*", ["2.up_proj", "2.down_proj"]),
        (["up_proj"], ["1.up_proj", "2.up_proj"]),
        (["1.up_proj", "2.down_proj"], ["1.up_proj", "2.down_proj"]),
        (("down_proj",), ["1.down_proj", "2.down_proj"]),
    ],
)
def test_a_string_must_match_the_whole_name_and_a_list_its_end(targets: Any, expected: list[str]) -> None:
    model = make()
    convert_model(model, wta(targets))
    assert converted(model) == expected


def test_a_suffix_begins_at_a_dot() -> None:
    model = nn.Sequential(nn.ModuleDict({"proj": nn.Linear(2, 2), "up_proj": nn.Linear(2, 2)}))
    convert_model(model, wta(["proj"]))
    assert converted(model) == ["0.proj"]


@pytest.mark.parametrize("excluded", [["down_proj"], r".*\.down_proj", ["1.down_proj", "2.down_proj"]])
def test_exclusion_wins(excluded: Any) -> None:
    model = make()
    report = convert_model(model, wta(exclude_modules=excluded))
    assert converted(model) == ["1.up_proj", "2.up_proj"]
    skipped = {s.modules: s.reason for s in report.skipped}
    assert skipped["{1-2}.down_proj"] == "excluded from wta_crs"


def test_any_of_its_names_may_target_or_exclude_a_shared_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.ModuleDict({"a": shared}), nn.ModuleDict({"b": shared, "c": nn.Linear(4, 4)}))
    convert_model(model, wta(["b"]))
    assert applied_configs(shared)
    memsave.restore_model(model)
    convert_model(model, wta(exclude_modules=["b"]))
    assert converted(model) == ["1.c"]


def test_without_configs_only_exact_default_methods_are_applied() -> None:
    model = make()
    report = convert_model(model)
    methods = {row.method for row in report.rows}
    assert methods == {"recompute_norm", "recompute_activation", "recompute_mlp"}
    assert {row.guarantee for row in report.rows} == {"exact"}
    assert report.count == 9  # a norm, four linears, two activations, two blocks


@dataclass(frozen=True, kw_only=True)
class ToyEmbeddingsConfig(ToyKeepPpsConfig):
    """A second method that is applied by default, for embeddings."""

    name: ClassVar[str] = "toy_embeddings"
    default: ClassVar[bool] = True

    def candidate(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)


@pytest.mark.parametrize("order", [1, -1])
def test_one_of_the_default_methods_may_find_nothing(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memsave.methods.METHODS", (ToyEmbeddingsConfig, RecomputeNormConfig)[::order])
    model = make()
    assert {row.method for row in convert_model(model).rows} == {"recompute_norm"}
    again = convert_model(model)
    assert again.count == 0 and {row.method for row in again.already} == {"recompute_norm"}
    with pytest.raises(NoMatchError, match="no module that toy_embeddings can convert"):
        convert_model(make(), [ToyEmbeddingsConfig(), RecomputeNormConfig()])


def test_default_methods_that_all_find_nothing_are_one_error(
    unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memsave.methods.METHODS", (RecomputeNormConfig, ToyEmbeddingsConfig, WTACRSConfig))
    model = unchanged(nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 1)))
    with pytest.raises(NoMatchError) as caught:
        convert_model(model)
    assert str(caught.value) == (
        "the model has no module that recompute_norm or toy_embeddings can convert. The model was not changed."
    )


def test_without_configs_a_refused_module_is_named(unchanged: Unchanged) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3))
    model[0].forward = lambda x: x
    with pytest.raises(NoMatchError, match="can convert: 0: its forward was replaced on the instance"):
        convert_model(unchanged(model))


def test_classes_say_what_they_were() -> None:
    model = make()
    convert_model(model)
    assert isinstance(model[0], nn.LayerNorm) and "LayerNorm" in type(model[0]).__name__
    assert isinstance(model[1].up_proj, nn.Linear)
    assert type(model) is nn.Sequential and isinstance(model[1], MLP) and "MLP" in type(model[1]).__name__


def test_a_method_of_model_scope_gets_the_root_and_is_found_again() -> None:
    model = make()
    assert [row.modules for row in convert_model(model, ToyRootConfig()).rows] == ["(the model)"]
    assert applied_configs(model) == {"toy_root": ToyRootConfig()}
    again = convert_model(model, ToyRootConfig())
    assert again.rows == () and len(again.already) == 1
    with pytest.raises(ConflictError, match="every=2.*was asked for, but it is converted by.*restore that one first"):
        convert_model(model, ToyRootConfig(every=2))


def test_equal_configs_count_once() -> None:
    report = convert_model(make(), [wta(), wta()])
    assert report.count == 4 and report.already == ()


def test_several_devices_are_converted_and_named() -> None:
    model = make()
    model[2].to("meta")
    report = convert_model(model)
    assert report.devices == ("cpu", "meta")
    assert "9 modules converted on cpu, meta" in str(report)
    assert "on cpu" not in str(convert_model(make()))


def test_a_model_with_nothing_to_convert_is_an_error(unchanged: Unchanged) -> None:
    with pytest.raises(NoMatchError, match=r"the model has no module that .*recompute_norm.* can convert\. The model"):
        convert_model(unchanged(nn.Sequential(nn.Tanh(), nn.Conv2d(3, 3, 1))))


@pytest.mark.parametrize("config", [None, wta()])
def test_the_model_itself_is_never_converted(config: Any, unchanged: Unchanged) -> None:
    with pytest.raises(NoMatchError, match="it is the model itself, whose class never changes; put it in a container"):
        convert_model(unchanged(nn.Linear(3, 3)), config)


def own_forward(model: Any) -> None:
    model[1].up_proj.forward = lambda x: x


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(model[1].up_proj, "weight", nn.Identity())


def compiled(model: Any) -> None:
    model[1].up_proj.compile()


def lazy(model: Any) -> None:
    model[1].up_proj = nn.LazyLinear(4)


REFUSED_MODULES = [
    (own_forward, "its forward was replaced on the instance, which would bypass the new class"),
    (parametrized, "it is parametrized (torch.nn.utils.parametrize), which swaps its class too"),
    (compiled, "it was compiled in place by module.compile(); convert first, compile afterwards"),
    (lazy, "its parameters are made by its first forward, which changes its class; run the model once first"),
]


@pytest.mark.parametrize(("spoil", "reason"), REFUSED_MODULES, ids=[f.__name__ for f, _ in REFUSED_MODULES])
@pytest.mark.parametrize("method", [RecomputeNormConfig, WTACRSConfig])
def test_a_module_that_would_lose_something_is_refused(
    spoil: Callable[[Any], None], reason: str, method: type[Any], unchanged: Unchanged
) -> None:
    model = make()
    spoil(model)
    with pytest.raises(NoMatchError, match=re.escape(f"only what cannot be converted (1.up_proj: {reason})")):
        convert_model(unchanged(model), method(target_modules=["1.up_proj"]))


@pytest.mark.parametrize(("spoil", "reason"), REFUSED_MODULES, ids=[f.__name__ for f, _ in REFUSED_MODULES])
def test_the_rest_of_the_model_is_converted_and_the_report_names_what_is_not(
    spoil: Callable[[Any], None], reason: str
) -> None:
    model = make()
    spoil(model)
    report = convert_model(model)
    linears = [name for name in converted(model) if name.endswith("_proj")]
    assert linears == ["1.down_proj", "2.up_proj", "2.down_proj"]
    (skip,) = (s for s in report.skipped if s.modules == "1.up_proj")
    assert skip.count == 1 and skip.reason == reason


def test_complex_weights_cannot_be_sampled(unchanged: Unchanged) -> None:
    model = make()
    model[1].up_proj = nn.Linear(4, 8, dtype=torch.complex64)
    with pytest.raises(NoMatchError, match="1.up_proj: its weight is complex; rows are sampled for real weights only"):
        convert_model(unchanged(model), wta(["1.up_proj"]))


def test_layers_with_a_forward_of_their_own_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class DoubledNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(4, 4), DoubledNorm(4), nn.Linear(4, 4))
    report = convert_model(model)
    assert converted(model) == ["2"]
    reasons = {s.kind: s.reason for s in report.skipped}
    assert reasons["DoubledNorm"] == "DoubledNorm has a forward of its own"


class FullyShardedDataParallel(nn.Module):
    """Has the name of torch's wrapper, which needs a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FSDPModule:
    """Has the name of the mixin that `fully_shard` gives to a module."""


class DistributedDataParallel(FullyShardedDataParallel):
    """Has the name of torch's wrapper, which needs a process group."""


def fully_shard(model: nn.Module) -> nn.Module:
    model.__class__ = type("FSDPSequential", (FSDPModule, type(model)), {})
    return model


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "wrapped in DataParallel: convert, restore or estimate the model before wrapping it"),
        (
            DistributedDataParallel,
            "wrapped in DistributedDataParallel: convert, restore or estimate the model before wrapping",
        ),
        (
            FullyShardedDataParallel,
            "wrapped in FullyShardedDataParallel: convert, restore or estimate the model before wrapping",
        ),
        (fully_shard, "wrapped in FSDPModule: convert, restore or estimate the model before fully_shard"),
        (torch.compile, "wrapped in OptimizedModule: convert, restore or estimate the model before torch.compile"),
        (
            lambda model: torch.jit.trace(model, torch.ones(1, 4)),
            "wrapped in ScriptModule: a scripted module has no Python forward",
        ),
    ],
)
@pytest.mark.parametrize("place", ["root", "child"])
@pytest.mark.filterwarnings("ignore:`?torch.jit:DeprecationWarning")
def test_wrapped_models_are_refused(wrap: Callable[[nn.Module], nn.Module], message: str, place: str) -> None:
    inner = make()
    model = wrap(inner) if place == "root" else nn.Sequential(wrap(inner), nn.Linear(4, 4))
    classes = [type(m) for m in model.modules()]
    for operation in (convert_model, memsave.restore_model):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            operation(model)
        assert ("the model is" if place == "root" else "its submodule '0' is") in str(caught.value)
    assert [type(m) for m in model.modules()] == classes


def test_real_ddp_is_refused(tmp_path: Any) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch is built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(make())
        with pytest.raises(UnsupportedModelError, match="wrapped in DistributedDataParallel"):
            convert_model(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "configs", "error", "message"),
    [
        ("gpt2", None, TypeError, "convert_model: expected a torch.nn.Module, got an instance of str. Nothing was cha"),
        (nn.Linear, None, TypeError, "torch.nn.Module, got the class Linear, not an instance. Nothing was changed"),
        (make(), WTACRSConfig, TypeError, r"got <class '.*WTACRSConfig'> \(did you mean WTACRSConfig\(...\)\?\)"),
        (make(), [wta(), "wta_crs"], TypeError, r"got 'wta_crs'; pass a config object, for example WTACRSConfig\("),
        (
            make(),
            "wta_crs",
            TypeError,
            r"got 'wta_crs'; pass a .* example WTACRSConfig\(target_modules=\[...\]\)\. The",
        ),
        (make(), "recompute_norm", TypeError, r"got 'recompute_norm'; .* example RecomputeNormConfig\(\)\. The"),
        (make(), "galore", TypeError, r"got 'galore'; pass a config object, for example [A-Z]\w+Config\("),
        (make(), {"method": "wta_crs"}, TypeError, r"got {'method': 'wta_crs'}; pass a config object, for example"),
        (make(), [], ValueError, r"expected at least one config, or None for the defaults; got \[\]"),
    ],
)
def test_wrong_arguments_are_named(model: Any, configs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convert_model(model, configs)


@pytest.mark.parametrize("operation", [convert_model, memsave.restore_model])
def test_a_report_is_not_a_model(operation: Callable[[Any], object]) -> None:
    report = convert_model(make())
    with pytest.raises(memsave.NotAModelError, match="convert_model works in place; .* Nothing was changed") as caught:
        operation(report)
    assert str(caught.value).startswith(f"{operation.__name__}: this is a memsave Report")


@pytest.mark.parametrize(("wrap", "inside"), [(nn.DataParallel, "module"), (torch.compile, "_orig_mod")])
def test_the_module_inside_a_wrapper_can_be_passed(wrap: Callable[[nn.Module], Any], inside: str) -> None:
    model = wrap(make())
    with pytest.raises(UnsupportedModelError, match=rf", or pass the module inside: model\.{inside}\. The model was"):
        convert_model(model)
    assert convert_model(getattr(model, inside)).count == 9


def test_two_methods_that_set_a_part_differently_conflict(unchanged: Unchanged) -> None:
    with pytest.raises(ConflictError) as caught:
        convert_model(unchanged(make()), [ToyKeepPpsConfig(), ToyKeepCrsConfig(target_modules=["up_proj"])])
    assert str(caught.value) == (
        "{1-2}.up_proj: ToyKeepCrsConfig(target_modules=('up_proj',)) and ToyKeepPpsConfig() both set keep, "
        "differently; leave one of them out. The model was not changed."
    )


def test_two_methods_that_set_a_part_alike_do_not_conflict() -> None:
    model = make()
    convert_model(model, [ToyKeepPpsConfig(), ToyKeepPpsAgainConfig()])
    assert list(applied_configs(model[1].up_proj)) == ["toy_keep_pps", "toy_keep_pps_again"]


@pytest.mark.parametrize("first", [ToyKeepPpsConfig(), wta(keep_ratio=0.5)])
def test_conflicts_are_found_across_calls(first: memsave.MethodConfig) -> None:
    model = make()
    convert_model(model, first)
    before = snapshot(model)
    with pytest.raises(ConflictError, match="both set keep, differently"):
        convert_model(model, ToyKeepCrsConfig())
    assert snapshot(model) == before
    memsave.restore_model(model)
    assert convert_model(model, ToyKeepCrsConfig()).count == 4


def test_other_settings_of_a_method_need_a_restore_first(unchanged: Unchanged) -> None:
    model = make()
    convert_model(model, wta(keep_ratio=0.5))
    with pytest.raises(ConflictError, match=r"keep_ratio=0.4, .* was asked for, but .*keep_ratio=0.5, ") as caught:
        convert_model(unchanged(model), wta(keep_ratio=0.4))
    advice = 'restore that one first: memsave.restore_model(model, methods=["wta_crs"]). The model was not changed.'
    assert str(caught.value).endswith(advice)


def test_what_lies_within_a_converted_module_is_named_as_such() -> None:
    model = make()
    convert_model(model, ToyAdapterConfig(target_modules=r".*"))
    report = convert_model(model, ToyAdapterConfig(target_modules=r".*"))
    reasons = {name: s.reason for s in report.skipped for name in s.names}
    assert reasons["1.up_proj.base"] == "within what toy_adapter converted"
    assert reasons["0"] == "not a kind that toy_adapter converts"


def test_the_exact_substrate_conflicts_with_nothing() -> None:
    model = make()
    convert_model(model, [RecomputeNormConfig(), wta()])
    assert list(applied_configs(model[1].up_proj)) == ["recompute_norm", "wta_crs"]
    assert list(applied_configs(model[0])) == ["recompute_norm"]


def test_a_method_cannot_convert_what_another_just_replaced(unchanged: Unchanged) -> None:
    adapted = ToyAdapterConfig(target_modules=["up_proj"])
    with pytest.raises(ConflictError, match=r"ToyAdapterConfig\(.*\) replaces 1.up_proj, so RecomputeNormConfig.* can"):
        convert_model(unchanged(make()), [adapted, RecomputeNormConfig()])


def test_every_problem_is_raised_at_once(unchanged: Unchanged) -> None:
    model = make()
    convert_model(model, wta(["up_proj"]))
    model.bell = 1
    with pytest.raises(ConversionError) as caught:
        convert_model(
            unchanged(model),
            [wta(["1.up_proj", "typo", "other_typo"]), ToyLowRankConfig(target_modules=["up_proj"]), ToyRootConfig()],
        )
    problems = caught.value.problems
    assert {type(p) for p in problems} == {NoMatchError, ConflictError, UnsupportedModelError}
    assert len(problems) >= 4
    text = str(caught.value)
    assert text.startswith(f"{len(problems)} problems; the model was not changed:\n  1. ")
    assert text.count("was not changed") == 1
    assert all(word in text for word in ("'typo'", "'other_typo'", "it has a bell already", "was asked for"))


def test_errors_can_be_told_apart_and_caught_as_value_errors() -> None:
    for error in (NoMatchError, ConflictError, UnsupportedModelError, ConversionError, memsave.RestoreError):
        assert issubclass(error, memsave.MemsaveError) and issubclass(error, ValueError)


def test_a_model_compiled_in_place_is_compiled_anew() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8))
    model.compile(backend="eager")
    x = torch.randn(64, 8)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
        gradients.append(model[1].weight.grad.clone())
        convert_model(model, wta(keep_ratio=0.1, min_rows=1))
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_method_of_model_scope_must_return_the_model(unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyRootConfig, "convert", lambda self, module: nn.Sequential(module))
    with pytest.raises(TypeError, match="a method of model scope must return the model itself"):
        convert_model(unchanged(make()), [wta(), ToyRootConfig()])
