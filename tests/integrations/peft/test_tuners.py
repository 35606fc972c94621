"""What PEFT's own suite asks of a tuner, on our own models: run for every tuner of memsave, wherever the tests run."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .shira import same
from .tuners import SETTINGS


class MLP(nn.Module):
    """Two linears to adapt, and a head that `modules_to_save` may name."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(10, 20), nn.Linear(20, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin1(self.lin0(x).tanh()))


class Conv1DNet(nn.Module):
    """The linear of GPT-2, whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.head = Conv1D(6, 10), nn.Linear(6, 3)
        nn.init.normal_(self.lin0.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin0(x).tanh())


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (MLP, ["lin0", "lin1"]),
    "conv1d": (Conv1DNet, ["lin0"]),
}
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(3))


class Case:
    """A model, and a tuner with settings."""

    def __init__(self, kind: str, tuner: Any, settings: dict[str, Any], model: str) -> None:
        self.id = f"{kind} {model}".replace(" ", "-")
        self.tuner, self.settings = tuner, settings
        self.make, self.targets = MODELS[model]

    def plain(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def config(self, **changes: Any) -> Any:
        return self.tuner(**{"target_modules": self.targets, **self.settings, **changes})

    def tuned(self, name: str = "default", *, start: bool = False, **changes: Any) -> Any:
        """A PEFT model whose adapter changes the output, unless it is as at the `start`."""
        plain, config = self.plain(), self.config(init_weights=start, **changes)
        torch.manual_seed(1)
        return peft.get_peft_model(plain, config, adapter_name=name).eval()

    def two(self) -> Any:
        """With adapters "default", which is active, and "other"."""
        model = self.tuned()
        torch.manual_seed(2)
        model.add_adapter("other", self.config(init_weights=False, seed=9))
        return model.eval()


CASES = [Case(*settings, model) for settings in SETTINGS for model in MODELS]
cases = pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])


def tuner_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer)]


def original_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that the plain model has, under its names."""
    state = {n.removeprefix("base_model.model."): t for n, t in model.state_dict().items()}
    return {n.replace("base_layer.", ""): t.clone() for n, t in state.items() if "memsave" not in n}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def differ(actual: Tensor, expected: Tensor) -> bool:
    return not torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)


@cases
def test_configs_come_back(case: Case, tmp_path: Path) -> None:
    made = case.config(modules_to_save=["head"], exclude_modules=["nothing"])
    made.save_pretrained(str(tmp_path))
    json.loads((tmp_path / "adapter_config.json").read_text())
    for again in (peft.PeftConfig.from_pretrained(str(tmp_path)), case.tuner.from_pretrained(str(tmp_path))):
        assert type(again) is case.tuner and again.to_dict() == type(made)(**made.to_dict()).to_dict()
        assert again.target_modules == set(case.targets) and again.modules_to_save == ["head"]
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert copied == made and copied.peft_type is made.peft_type


@cases
def test_attributes(case: Case) -> None:
    model = case.tuned("mine")
    assert all(hasattr(model, name) for name in ("save_pretrained", "from_pretrained", "push_to_hub"))
    assert model.active_adapters == ["mine"] and list(model.peft_config) == ["mine"]
    layers = tuner_layers(model)
    assert len(layers) == len(case.targets)
    features = {"lin0": (10, 20 if case.make is MLP else 6), "lin1": (20, 8)}
    assert [(m.in_features, m.out_features) for m in layers] == [features[name] for name in case.targets]
    for layer, name in zip(layers, case.targets, strict=True):
        assert layer.active_adapter == ["mine"] and not layer.merged and not layer.disable_adapters
        assert torch.equal(layer.weight, layer.get_base_layer().weight)
        assert type(layer).__name__ in repr(model) and f"({name})" in repr(model)
    trained, total = model.get_nb_trainable_parameters()
    assert 0 < trained < total


@cases
def test_nothing_changes_at_the_start(case: Case) -> None:
    assert torch.equal(case.tuned(start=True)(X), case.plain()(X))
    assert differ(case.tuned()(X), case.plain()(X))


@cases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_under_another_name(case: Case, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = case.tuned("mine")
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = peft.PeftModel.from_pretrained(
        case.plain(), str(tmp_path / "mine"), adapter_name="theirs", low_cpu_mem_usage=low_cpu_mem_usage
    ).eval()
    assert_close(again(X), model(X))
    assert not any(p.is_meta for p in again.parameters())
    ours, theirs = (get_peft_model_state_dict(m, adapter_name=n) for m, n in ((model, "mine"), (again, "theirs")))
    assert same(theirs, ours)
    assert not any(p.requires_grad for p in again.parameters())
    trainable = peft.PeftModel.from_pretrained(case.plain(), str(tmp_path / "mine"), is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


@cases
def test_names_that_hold_each_other(case: Case, tmp_path: Path) -> None:
    model = case.tuned("one")
    torch.manual_seed(2)
    model.add_adapter("one_more", case.config(init_weights=False))
    model.save_pretrained(str(tmp_path))
    for name in ("one", "one_more"):
        model.set_adapter(name)
        again = peft.PeftModel.from_pretrained(case.plain(), str(tmp_path / name)).eval()
        assert_close(again(X), model(X))


@cases
def test_several_adapters(case: Case) -> None:
    model = case.two()
    first = model(X)
    model.set_adapter("other")
    second = model(X)
    assert model.active_adapters == ["other"] and differ(second, first) and differ(second, case.plain()(X))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".other" in n for n in trained)
    model.set_adapter("default")
    assert torch.equal(model(X), first)
    model.base_model.set_adapter(["default", "other"])
    assert differ(model(X), first) and differ(model(X), second)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {".default" in n for n in names} == {True, False}


@cases
def test_merging_and_unmerging(case: Case) -> None:
    model = case.tuned()
    on, before = model(X), [layer.weight.clone() for layer in tuner_layers(model)]
    for _ in range(2):
        model.merge_adapter()
        assert all(layer.merged for layer in tuner_layers(model))
        assert_close(model(X), on)
        model.merge_adapter()  # nothing is merged twice
        assert_close(model(X), on)
        model.unmerge_adapter()
        assert torch.equal(model(X), on) or not any(layer.merged for layer in tuner_layers(model))
        assert_close(model(X), on)
    assert all(torch.equal(layer.weight, w) for layer, w in zip(tuner_layers(model), before, strict=True))


@cases
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_for_good(case: Case, safe_merge: bool) -> None:
    model = case.tuned()
    on = model(X)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not tuner_layers(merged) and type(merged.lin0) is type(case.plain().lin0)
    assert_close(merged(X), on)
    assert sorted(merged.state_dict()) == sorted(case.plain().state_dict())


@cases
def test_a_safe_merge_of_what_is_not_finite(case: Case) -> None:
    model = case.tuned()
    broken = next(p for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        broken.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert same(original_state(case.tuned(start=True)), dict(case.plain().state_dict()))


@cases
def test_merging_several(case: Case) -> None:
    model = case.two()
    model.base_model.set_adapter(["default", "other"])
    both = model(X)
    model.set_adapter("default")
    one = model(X)
    model.merge_adapter(["default", "other"])
    assert_close(model(X), both)
    model.unmerge_adapter()
    assert_close(model(X), one)
    assert_close(case.two().merge_and_unload(adapter_names=["other", "default"])(X), both)
    assert differ(both, one)


@cases
def test_disabling(case: Case) -> None:
    model, plain = case.tuned(), case.plain()
    on = model(X)
    with model.disable_adapter():
        with torch.no_grad():
            assert torch.equal(model(X), plain(X))
        assert_close(model(X), plain(X))
    assert torch.equal(model(X), on)
    model.merge_adapter()
    with model.disable_adapter():
        assert_close(model(X), plain(X))
    assert_close(model(X), on)
    model.base_model.disable_adapter_layers()
    assert_close(model(X), plain(X))
    model.base_model.enable_adapter_layers()
    assert_close(model(X), on)


@cases
@pytest.mark.parametrize("deleted", ["default", "other"])
def test_deleting(case: Case, deleted: str) -> None:
    """The active one, or the other: what is left works, and nothing is left of it."""
    model = case.two()
    kept = "other" if deleted == "default" else "default"
    model.set_adapter(kept)
    expected = model(X)
    model.set_adapter("default")
    model.delete_adapter(deleted)
    assert list(model.peft_config) == [kept]
    assert not any(f".{deleted}" in n for n in [*model.state_dict(), *(n for n, _ in model.named_buffers())])
    model.set_adapter(kept)
    assert torch.equal(model(X), expected)
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter(kept)
    assert_close(model.base_model.model(X), case.plain()(X))  # a PeftModel itself wants an adapter


@cases
def test_unloading(case: Case) -> None:
    model = case.two().unload()
    assert type(model) is case.make and not tuner_layers(model)
    assert same(dict(model.state_dict()), dict(case.plain().state_dict()))
    assert torch.equal(model(X), case.plain()(X))


@cases
def test_only_the_adapter_is_trained(case: Case) -> None:
    model = case.tuned().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "memsave" in n}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(model.prefix in n for n in trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    after = dict(model.named_parameters())
    for name in trained:
        assert differ(after[name], before[name])
    for name in before.keys() - trained:
        assert torch.equal(after[name], before[name])
    assert same(original_state(model), dict(case.plain().state_dict()))


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_dtypes(case: Case, dtype: torch.dtype, autocast: bool) -> None:
    """Adapters have the dtype of the base; the output has that of the plain model."""
    plain = case.plain().to(dtype)
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(plain), case.config(init_weights=False)).eval()
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = (X if autocast else X.to(dtype)).requires_grad_()
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16, enabled=autocast):
        y, expected = model(x), plain(x)
    assert y.dtype == expected.dtype and bool(y.isfinite().all()) and not torch.equal(y, expected)
    y.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == dtype and g.isfinite().all() for g in grads)
    merged = model.merge_and_unload()
    with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(merged(x), y, rtol=0.1, atol=0.1)


@cases
def test_modules_to_save(case: Case, tmp_path: Path) -> None:
    model = case.tuned(modules_to_save=["head"]).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    model.eval().save_pretrained(str(tmp_path))
    again = peft.PeftModel.from_pretrained(case.plain(), str(tmp_path)).eval()
    assert_close(again(X), model(X))
    merged = model.merge_and_unload()
    assert_close(merged(X), again(X))
    assert type(merged.head) is nn.Linear and not torch.equal(merged.head.weight, case.plain().head.weight)


@cases
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injecting(case: Case, low_cpu_mem_usage: bool) -> None:
    model = case.plain()
    torch.manual_seed(1)
    config = case.config(init_weights=False)
    assert peft.inject_adapter_in_model(config, model, low_cpu_mem_usage=low_cpu_mem_usage) is model
    assert len(tuner_layers(model)) == len(case.targets)
    if low_cpu_mem_usage:
        assert any(p.is_meta for p in model.parameters())
        peft.set_peft_model_state_dict(model, get_peft_model_state_dict(case.tuned()), low_cpu_mem_usage=True)
        assert not any(p.is_meta for p in model.parameters())
    assert_close(model(X), case.tuned()(X))


@cases
def test_copies(case: Case) -> None:
    model = case.two()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))
        twin.set_adapter("other")
        assert differ(twin(X), model(X))
        assert same(dict(twin.unload().state_dict()), dict(case.plain().state_dict()))


@cases
def test_wrong_targets_and_names(case: Case) -> None:
    with pytest.raises(ValueError, match="not found in the base model|nowhere"):
        peft.get_peft_model(case.plain(), case.config(target_modules=["nowhere"]))
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(case.plain(), case.tuner(**case.settings))
    model = case.tuned()
    with pytest.raises(ValueError, match="already exists|exists already"):
        model.add_adapter("default", case.config())
    assert torch.equal(model(X), case.tuned()(X))
