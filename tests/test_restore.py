"""restore_model, and all-or-nothing: properties over random module trees and over every kind of method."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import memsave
from memsave import MethodConfig, RecomputeNormConfig, RestoreError, WTACRSConfig
from memsave.config import applied_configs

from .snapshot import bits, snapshot
from .toys import (
    AdapterLinear,
    ToyAdapterConfig,
    ToyKeepPpsConfig,
    ToyLowRankConfig,
    ToyRootConfig,
)
from .trees import WIDTH, Tree, property_settings, trees

norm = RecomputeNormConfig()
sampled = WTACRSConfig(keep_ratio=0.5, min_rows=1, target_modules=r".*")
low_rank = ToyLowRankConfig(target_modules=r".*")
adapter = ToyAdapterConfig(target_modules=r".*")
root = ToyRootConfig()
keep_all = ToyKeepPpsConfig()

IN_PLACE: list[list[MethodConfig]] = [
    [norm],
    [sampled],
    [norm, sampled],
    [sampled, norm],
    [root],
    [norm, sampled, root],
    [norm, keep_all],
]
REPLACING: list[list[MethodConfig]] = [[low_rank], [adapter], [norm, adapter], [root, low_rank]]


def each(parameter: str, values: Sequence[Sequence[MethodConfig]]) -> Any:
    """The test runs for every list of methods, and for random trees with each."""
    return pytest.mark.parametrize(parameter, values, ids=["+".join(c.name for c in configs) for configs in values])


class Broken(Exception):
    """Raised by a method in the middle of its work."""


class _FaultAt:
    """A stand-in for a method's `convert` or `restore` that raises at call `at`, counted over all methods."""

    def __init__(self, at: int) -> None:
        self.left = at

    def wrap(self, original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def call(config: MethodConfig, module: nn.Module, **kwargs: Any) -> nn.Module:
            self.left -= 1
            if self.left == -1:
                raise Broken
            return original(config, module, **kwargs)

        return call


def with_fault(configs: Sequence[MethodConfig], operation: str, at: int, action: Callable[[], object]) -> bool:
    """Run `action` with a fault in the `at`-th call of `operation`; whether it was raised."""
    fault = _FaultAt(at)
    patches = [mock.patch.object(type(c), operation, fault.wrap(getattr(type(c), operation))) for c in configs]
    for patch in patches:
        patch.start()
    try:
        action()
    except Broken:
        return True
    finally:
        for patch in patches:
            patch.stop()
    return False


def restore(model: nn.Module, **kwargs: Any) -> memsave.Report:
    """Restore whatever there is."""
    return memsave.restore_model(model, **{"adapters": "merge", "allow_lossy": True, **kwargs})


def outputs(model: nn.Module) -> list[bytes | str]:
    """Bits of the output and of all gradients of one step; the same for equal models."""
    x = torch.linspace(-1, 1, 6 * WIDTH).view(6, WIDTH).requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        y: Tensor = model(x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        (y * torch.arange(6.0)[:, None]).sum().backward(inputs=[x, *parameters])
    grads = [x.grad, *(p.grad for p in parameters)]
    model.zero_grad()
    return [bits(y), *(bits(g) for g in grads if g is not None)]


@each("configs", IN_PLACE)
@property_settings
@given(tree=trees())
def test_restoring_gives_back_every_object_class_flag_and_bit(tree: Tree, configs: list[MethodConfig]) -> None:
    before = snapshot(tree)
    report = memsave.convert_model(tree, configs)
    assert report.count > 0
    assert snapshot(tree) != before
    restore(tree)
    assert snapshot(tree) == before


@each("configs", IN_PLACE)
@property_settings
@given(tree=trees())
def test_conversion_keeps_parameters_buffers_flags_and_children(tree: Tree, configs: list[MethodConfig]) -> None:
    before = snapshot(tree)
    modules, flags = list(tree.modules()), [m.training for m in tree.modules()]
    random_state = torch.get_rng_state()
    memsave.convert_model(tree, configs)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = snapshot(tree)
    assert {k: after[k] for k in ("parameters", "buffers", "keys")} == {
        k: before[k] for k in ("parameters", "buffers", "keys")
    }
    assert [id(m) for m in tree.modules()] == [id(m) for m in modules]
    assert [m.training for m in modules] == flags
    for name, module in after["modules"].items():
        assert issubclass(module["class"], before["modules"][name]["class"])
        assert module["hooks"] == before["modules"][name]["hooks"]


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees())
def test_a_dry_run_changes_nothing(tree: Tree, configs: list[MethodConfig]) -> None:
    before, random_state = snapshot(tree), torch.get_rng_state()
    planned = memsave.convert_model(tree, configs, dry_run=True)
    assert snapshot(tree) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    done = memsave.convert_model(tree, configs)
    assert (planned.rows, planned.skipped) == (done.rows, done.skipped)


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees())
def test_a_fault_at_any_swap_leaves_the_model_as_it_was(tree: Tree, configs: list[MethodConfig]) -> None:
    before = snapshot(tree)
    at = 0
    while with_fault(configs, "convert", at, lambda: memsave.convert_model(tree, configs)):
        assert snapshot(tree) == before
        at += 1
    assert at == sum(row.count for row in memsave.convert_model(tree, configs).already)


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees(), only_first=st.booleans())
def test_a_fault_at_any_step_of_restoring_leaves_the_model_converted(
    tree: Tree, configs: list[MethodConfig], only_first: bool
) -> None:
    memsave.convert_model(tree, configs)
    for module in tree.modules():
        if isinstance(module, AdapterLinear):
            module.delta.data.fill_(0.5)
    before = snapshot(tree)
    methods = [c.name for c in configs[: 1 if only_first else None]]
    at = 0
    while with_fault(configs, "restore", at, lambda: restore(tree, methods=methods)):
        assert snapshot(tree) == before
        at += 1
    assert at >= len(methods)


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees())
def test_converting_twice_equals_once(tree: Tree, configs: list[MethodConfig]) -> None:
    once = memsave.convert_model(tree, configs)
    before = snapshot(tree)
    twice = memsave.convert_model(tree, configs)
    assert snapshot(tree) == before
    assert twice.count == 0 and twice.rows == ()
    assert counts(twice.already) == counts(once.rows)


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees(), protocol=st.sampled_from([None, 0, 2, pickle.HIGHEST_PROTOCOL]))
def test_copies_are_converted_alike_and_compute_alike(
    tree: Tree, configs: list[MethodConfig], protocol: int | None
) -> None:
    memsave.convert_model(tree, configs)
    copied = copy.deepcopy(tree) if protocol is None else pickle.loads(pickle.dumps(tree, protocol))
    for (name, old), (other_name, new) in zip(tree.named_modules(), copied.named_modules(), strict=True):
        assert name == other_name and old is not new
        assert type(new) is type(old)
        assert applied_configs(new) == applied_configs(old)
        assert [old.training, *old.__dict__] == [new.training, *new.__dict__]
    assert outputs(copied) == outputs(tree)
    restore(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in restored(tree).modules()]


def counts(rows: Sequence[Any]) -> Counter[str]:
    """Modules per method."""
    return Counter(row.method for row in rows for _ in row.names)


def restored(model: nn.Module) -> nn.Module:
    restore(model)
    return model


@each("configs", IN_PLACE + REPLACING)
@property_settings
@given(tree=trees())
def test_shared_modules_stay_shared_and_tied_parameters_stay_tied(tree: Tree, configs: list[MethodConfig]) -> None:
    shared, tied = _shared(tree.named_modules), _shared(tree.named_parameters)
    memsave.convert_model(tree, configs)
    now = _shared(tree.named_modules)
    assert {name: now[name] for name in shared} == shared
    if configs in IN_PLACE:
        assert _shared(tree.named_parameters) == tied
    restore(tree)
    assert _shared(tree.named_modules) == shared


def _shared(named: Callable[..., Any]) -> dict[str, set[str]]:
    """For each name, all the names of the same object."""
    names: dict[int, set[str]] = {}
    for name, value in named(remove_duplicate=False):
        names.setdefault(id(value), set()).add(name)
    return {name: group for group in names.values() for name in group}


@each("pair", [(norm, sampled), (norm, root), (sampled, root), (norm, keep_all)])
@property_settings
@given(tree=trees())
def test_the_order_of_two_methods_makes_no_difference(tree: Tree, pair: tuple[MethodConfig, MethodConfig]) -> None:
    other = copy.deepcopy(tree)
    memsave.convert_model(tree, list(pair))
    for config in reversed(pair):
        memsave.convert_model(other, config)
    for one, two in zip(tree.modules(), other.modules(), strict=True):
        assert type(one) is type(two)
        assert applied_configs(one) == applied_configs(two)
        assert one.__dict__.get("_memsave_parts") == two.__dict__.get("_memsave_parts")
    assert outputs(tree) == outputs(other)


@each("pair", [(norm, sampled), (sampled, norm), (norm, root), (root, norm), (keep_all, norm)])
@property_settings
@given(tree=trees())
def test_restoring_one_method_of_two_leaves_the_other(tree: Tree, pair: tuple[MethodConfig, MethodConfig]) -> None:
    kept, dropped = pair
    memsave.convert_model(tree, kept)
    before = snapshot(tree)
    memsave.convert_model(tree, dropped)
    report = memsave.restore_model(tree, methods=[dropped.name])
    assert {row.method for row in report.rows} == {dropped.name}
    assert snapshot(tree) == before


def test_an_optimizer_made_before_conversion_goes_on_working() -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Linear(8, 4))
    models = [plain, copy.deepcopy(plain)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in models]
    memsave.convert_model(models[1])
    start = models[1][1].weight.detach().clone()
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 40).view(5, 8)).square().sum().backward()
            optimizer.step()
    assert not torch.equal(models[1][1].weight, start)
    for expected, parameter in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-5, atol=1e-5)


def test_hook_handles_made_before_conversion_go_on_working() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4))
    calls = []
    handle = model[0].register_forward_hook(lambda *args: calls.append(args))
    memsave.convert_model(model)
    model(torch.ones(1, 4))
    handle.remove()
    model(torch.ones(1, 4))
    assert len(calls) == 1


def two_linears() -> Any:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))


def test_an_approximate_method_comes_back_as_its_dense_equivalent_only_when_asked() -> None:
    model = two_linears()
    x = torch.randn(3, WIDTH)
    y, keys = model(x), list(model.state_dict())
    memsave.convert_model(model, low_rank)
    assert type(model[0]).__name__ == "LowRankLinear"
    before = snapshot(model)
    with pytest.raises(RestoreError, match="toy_low_rank changed the function.*allow_lossy=True.*was not changed"):
        memsave.restore_model(model)
    assert snapshot(model) == before
    memsave.restore_model(model, allow_lossy=True)
    assert type(model[0]) is nn.Linear and list(model.state_dict()) == keys
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("choice", ["merge", "drop"])
def test_adapters_come_off_only_by_an_explicit_choice(choice: str) -> None:
    model = two_linears()
    x = torch.randn(3, WIDTH)
    original, plain_output = model[0], model(x)
    memsave.convert_model(model, adapter)
    assert type(model[0]).__name__ == "AdapterLinear"
    model[0].delta.data.fill_(0.5)
    adapted_output, before = model(x), snapshot(model)
    with pytest.raises(RestoreError, match="toy_adapter holds trained adapters; say adapters='merge' or 'drop'"):
        memsave.restore_model(model)
    assert snapshot(model) == before
    memsave.restore_model(model, adapters=choice)
    assert type(model[0]) is nn.Linear and (model[0] is original) == (choice == "drop")
    assert not torch.allclose(adapted_output, plain_output)
    torch.testing.assert_close(model(x), adapted_output if choice == "merge" else plain_output)


@pytest.mark.parametrize("config", [low_rank, adapter])
def test_what_takes_a_module_s_place_is_in_its_mode(config: MethodConfig) -> None:
    model = two_linears()
    model[0].eval()
    memsave.convert_model(model, config)
    assert [m.training for m in model] == [False, True]
    model[0].train()
    model[1].eval()
    restore(model)
    assert [m.training for m in model] == [True, False]


def test_the_method_applied_last_comes_off_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def recorded(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def call(config: MethodConfig, module: nn.Module, **kwargs: Any) -> nn.Module:
            order.append(config.name)
            return original(config, module, **kwargs)

        return call

    model = two_linears()
    memsave.convert_model(model, [norm, keep_all, root])
    for config in (norm, keep_all, root):
        monkeypatch.setattr(type(config), "restore", recorded(type(config).restore))
    memsave.restore_model(model)
    assert order == ["toy_root", *("toy_keep_pps", "recompute_norm") * 2]


def test_every_missing_choice_is_named_at_once() -> None:
    model = two_linears()
    memsave.convert_model(model, [ToyLowRankConfig(target_modules=["0"]), ToyAdapterConfig(target_modules=["1"])])
    before = snapshot(model)
    with pytest.raises(memsave.ConversionError) as caught:
        memsave.restore_model(model)
    assert [type(p) for p in caught.value.problems] == [RestoreError, RestoreError]
    assert "allow_lossy=True" in str(caught.value) and "adapters='merge'" in str(caught.value)
    assert snapshot(model) == before


def test_methods_that_are_not_applied_are_refused() -> None:
    model = two_linears()
    memsave.convert_model(model, norm)
    before = snapshot(model)
    with pytest.raises(RestoreError, match=r"\['wta_crs'\] not applied to this model; it has \['recompute_norm'\]"):
        memsave.restore_model(model, methods=["recompute_norm", "wta_crs"])
    assert snapshot(model) == before


def test_one_method_may_be_named_by_a_string() -> None:
    model = two_linears()
    memsave.convert_model(model, [norm, sampled])
    assert memsave.restore_model(model, methods="wta_crs").count == 2
    assert applied_configs(model[0]) == {"recompute_norm": norm}


def test_adapters_must_be_one_of_the_two_choices() -> None:
    with pytest.raises(ValueError, match="expected 'merge' or 'drop', got 'keep'"):
        memsave.restore_model(two_linears(), adapters="keep")


def test_a_plain_model_is_left_alone_and_the_report_says_so() -> None:
    model = two_linears()
    before = snapshot(model)
    report = memsave.restore_model(model)
    assert snapshot(model) == before
    assert report.count == 0 and str(report) == "memsave: 0 modules restored"


@pytest.mark.parametrize("change", ["parametrized", "forward replaced"])
def test_a_module_that_was_changed_since_is_not_restored(change: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    memsave.convert_model(model)
    if change == "parametrized":
        nn.utils.parametrizations.weight_norm(model[1])
    else:
        model[1].forward = model[1].forward
    before = snapshot(model)
    expected = "its class was changed to" if change == "parametrized" else "its forward was replaced on the instance"
    with pytest.raises(memsave.RestoreError, match=rf"restore_model: 1: {expected}.*The model was not changed"):
        memsave.restore_model(model)
    assert snapshot(model) == before
