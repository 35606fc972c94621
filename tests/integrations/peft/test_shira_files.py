"""Adapters to files and back, PEFT's own format, plain checkpoints; and files that are damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import memsave
from memsave import LoadError, SaveError
from memsave.peft import adapter_overlap

from .shira import (
    WIDTH,
    Toy,
    adapted,
    config,
    files,
    indices,
    layers,
    llama,
    one,
    randomize,
    same,
    tokens,
    values,
    weights,
)

BATCHES = [torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(2)]
MASKS = ["random", "magnitude", "struct", "gradient", "snip"]
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(7))
ADAPTER = "adapter_model.safetensors"
PROJECTIONS = ["q_proj", "down_proj"]


def plain_toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def saved(directory: Path, mask: str = "magnitude", **settings: Any) -> Any:
    """A trained toy whose adapter is in `directory`."""
    calibration = {"calibration": BATCHES, "calibration_loss": lambda y: y.square().sum()}
    model = adapted(plain_toy(), mask=mask, **(calibration if mask in ("gradient", "snip") else {}), **settings)
    model.save_pretrained(str(directory))
    return model


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "PeftModel": lambda model, path: peft.PeftModel.from_pretrained(model, str(path)),
    "low_cpu_mem_usage": lambda model, path: peft.PeftModel.from_pretrained(model, str(path), low_cpu_mem_usage=True),
    "memsave": lambda model, path: (memsave.load_adapter(model, path), model)[1],
    "added beside": lambda model, path: beside(model, path),
}


def beside(model: Any, path: Path) -> Any:
    """Loaded as the second adapter, and made active."""
    tuned = peft.get_peft_model(model, config(seed=77), adapter_name="first")
    tuned.load_adapter(str(path), adapter_name="default")
    tuned.set_adapter("default")
    return tuned


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("mask", MASKS)
def test_adapters_come_back_bit_for_bit(mask: str, loader: str, tmp_path: Path) -> None:
    model = saved(tmp_path, mask)
    again = LOADERS[loader](plain_toy(), tmp_path)
    assert torch.equal(again(X), model(X)) and not torch.equal(again(X), plain_toy()(X))
    for a, b in zip(layers(again), layers(model), strict=True):
        assert torch.equal(indices(a), indices(b))
        assert torch.equal(a.memsave_shira_values["default"], b.memsave_shira_values["default"])
    assert files(tmp_path) <= {".json", ".safetensors", ".md"}  # the last is PEFT's model card


@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_transformers_load_adapters(mask: str, tmp_path: Path) -> None:
    batch = tokens()
    tuned = adapted(llama(), target_modules=PROJECTIONS, mask=mask)
    tuned.save_pretrained(str(tmp_path))
    for load in (lambda m: m.load_adapter(str(tmp_path)), lambda m: memsave.load_adapter(m, tmp_path)):
        model = llama()
        load(model)
        assert torch.equal(model(**batch).logits, tuned(**batch).logits)
        assert not torch.equal(model(**batch).logits, llama()(**batch).logits)


def test_transformers_add_and_save_an_adapter(tmp_path: Path) -> None:
    tuned, model = adapted(llama(), target_modules=PROJECTIONS), llama()
    try:
        model.add_adapter(config(target_modules=PROJECTIONS))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"this transformers refuses this PEFT: {error}")
    randomize(model)
    tuned.save_pretrained(str(tmp_path / "peft"))
    model.save_pretrained(str(tmp_path / "transformers"))  # the adapter alone
    assert torch.equal(model(**tokens()).logits, tuned(**tokens()).logits)
    assert same(load_file(tmp_path / "transformers" / ADAPTER), load_file(tmp_path / "peft" / ADAPTER))


@pytest.mark.parametrize(("mask", "most"), [("random", 2.0), ("gradient", 4.2), ("magnitude", 4.2)])
def test_bytes_on_disk(mask: str, most: float, tmp_path: Path) -> None:
    """Per value in bf16; beside them the header of safetensors, whatever the layer's size."""
    torch.manual_seed(0)
    batch = torch.randn(4, 600, dtype=torch.bfloat16)
    settings = {"calibration": [batch], "calibration_loss": lambda y: y.square().sum()} if mask == "gradient" else {}
    linear = nn.Linear(600, 500).to(torch.bfloat16)
    model, layer = one(linear, mask=mask, density=0.01, **settings)
    model.save_pretrained(str(tmp_path))
    header_bytes = 8 + int.from_bytes((tmp_path / ADAPTER).read_bytes()[:8], "little")
    size = (tmp_path / ADAPTER).stat().st_size
    assert len(indices(layer)) == 3000 and header_bytes < 400
    assert size <= 3000 * most + (8 + header_bytes if mask == "random" else 0)


def peft_shira(directory: Path) -> Any:
    """A toy with PEFT's own SHIRA adapter, saved."""
    model = peft.get_peft_model(plain_toy(), peft.ShiraConfig(r=2, target_modules=["q", "out"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_weight" in name:
                parameter.normal_()
    model.save_pretrained(str(directory))
    return model


def test_pefts_own_checkpoints_are_imported(tmp_path: Path) -> None:
    theirs = peft_shira(tmp_path)
    model = plain_toy()
    memsave.load_adapter(model, tmp_path)
    assert len(layers(model)) == 2 and not any(p.requires_grad for p in values(model))
    torch.testing.assert_close(model(X), theirs(X))
    assert not torch.allclose(model(X), plain_toy()(X))
    wrapped = adapted(plain_toy(), density=0.1)
    memsave.load_adapter(wrapped, tmp_path, adapter_name="theirs", is_trainable=True)
    wrapped.set_adapter("theirs")
    torch.testing.assert_close(wrapped(X), theirs(X))
    wrapped.save_pretrained(str(tmp_path / "ours"))
    again = peft.PeftModel.from_pretrained(plain_toy(), str(tmp_path / "ours" / "theirs"))
    assert torch.equal(again(X), wrapped(X))


@pytest.mark.parametrize("settings", [{"r": 1, "density": None}, {"density": 0.2}], ids=["r", "density"])
def test_export_as_pefts_own(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(plain_toy(), **settings)
    before = weights(model)
    memsave.export(model, "peft_shira", tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain_toy(), str(tmp_path))
    assert type(theirs.peft_config["default"]) is peft.ShiraConfig
    torch.testing.assert_close(theirs(X), model(X))
    assert same(weights(model), before)
    back = plain_toy()
    if "r" in settings:
        memsave.load_adapter(back, tmp_path)
        assert torch.equal(back(X), model(X))


def test_an_export_of_another_budget_is_imported(tmp_path: Path) -> None:
    """Filled up by zeros at one position."""
    model = adapted(plain_toy(), density=0.2)
    memsave.export(model, "peft_shira", tmp_path)
    back = plain_toy()
    memsave.load_adapter(back, tmp_path)
    torch.testing.assert_close(back(X), model(X))


@pytest.mark.parametrize("apply", ["auto", "added"])
def test_export_as_a_plain_checkpoint(apply: str, tmp_path: Path) -> None:
    tuned = adapted(llama(), target_modules=PROJECTIONS, apply=apply)
    before = weights(tuned)
    memsave.export(tuned, "plain", tmp_path)
    assert files(tmp_path) == {".json", ".safetensors"}
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path))
    assert type(model) is type(llama()) and not layers(model)
    torch.testing.assert_close(model(**tokens()).logits, tuned(**tokens()).logits)
    assert same(weights(tuned), before)
    with pytest.raises(SaveError, match="not an empty directory. Nothing was written"):
        memsave.export(tuned, "plain", tmp_path)


def test_what_memsave_cannot_merge_is_not_exported(tmp_path: Path) -> None:
    whole = peft.get_peft_model(Toy(), config(target_modules=["q"], modules_to_save=["out"]))
    lora = peft.get_peft_model(Toy(), peft.LoraConfig(target_modules=["q"]))
    for model, kind in ((whole, "out is a ModulesToSaveWrapper"), (lora, "q is a Linear")):
        with pytest.raises(SaveError, match=f"export: {kind}, which memsave cannot merge.*Nothing was written"):
            memsave.export(model, "plain", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_wrong_exports(tmp_path: Path) -> None:
    model = adapted(plain_toy())
    with pytest.raises(ValueError, match="expected one of .'plain', 'peft_shira'., got 'onnx'"):
        memsave.export(model, "onnx", tmp_path / "a")
    with pytest.raises(ValueError, match="expected one of .'default'., got 'unknown'"):
        memsave.export(model, "peft_shira", tmp_path / "a", adapter_name="unknown")
    with pytest.raises(SaveError, match="r = 2, which is more than its weight has entries"):
        memsave.export(one(nn.Linear(2, 3), density=1.0)[0], "peft_shira", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def truncated(path: Path) -> None:
    file = path / ADAPTER
    file.write_bytes(file.read_bytes()[:-20])


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / ADAPTER)
        change(tensors)
        save_file(tensors, path / ADAPTER, metadata={"format": "pt"})

    return edit


def flip(tensors: dict[str, Any]) -> None:
    code = tensors["base_model.model.k.memsave_shira_mask"]
    code[5] ^= 8


def shorten(tensors: dict[str, Any]) -> None:
    key = "base_model.model.k.memsave_shira_values"
    tensors[key] = tensors[key][:-1].clone()


def drop(tensors: dict[str, Any], *parts: str) -> None:
    for part in parts:
        del tensors[f"base_model.model.v.memsave_shira_{part}"]


def settings(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def lora(path: Path) -> None:
    peft.get_peft_model(plain_toy(), peft.LoraConfig(r=1, target_modules=["q"])).save_pretrained(str(path))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "adapter_model.safetensors cannot be read"),
    "no tensors": (lambda path: (path / ADAPTER).unlink(), "adapter_model.safetensors cannot be read"),
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no json": (lambda path: (path / "adapter_config.json").write_text("{"), "adapter_config.json cannot be read"),
    "tampered mask": (edited(flip), "k: (the mask is damaged|the mask does not hold|the mask's positions)"),
    "wrong count": (edited(shorten), r"k: expected 36 values, got torch.float32 of shape \(35,\)"),
    "missing layer": (edited(lambda t: drop(t, "values", "mask")), "v: its values or its mask are missing"),
    "missing mask": (edited(lambda t: drop(t, "mask")), "v: its values or its mask are missing"),
    "other kind": (lora, "an adapter of kind 'LORA'; expected one of memsave or PEFT's SHIRA"),
    "other density": (settings(density=0.5), "expected 72 values"),
    "bad setting": (settings(density=7), "density: expected a fraction"),
    "no such target": (settings(target_modules=["nowhere"]), "nowhere"),
    "another target": (
        settings(target_modules=["q", "k", "v"]),
        "out.memsave_shira_mask.*: the model has no such layer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_leave_the_model_unchanged(damage: str, tmp_path: Path, unchanged: Any) -> None:
    saved(tmp_path)
    change, words = DAMAGES[damage]
    change(tmp_path)
    model = unchanged(plain_toy())
    with pytest.raises(LoadError, match=f"(?s){words}") as raised:
        memsave.load_adapter(model, tmp_path)
    assert "The model was not changed." in str(raised.value)
    assert type(model.q) is nn.Linear and not hasattr(model, "peft_config")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_leave_other_adapters_alone(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    change, words = DAMAGES[damage]
    change(tmp_path)
    model = adapted(plain_toy(), target_modules=["q"])
    before, out = copy.deepcopy(weights(model)), model(X)
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    with pytest.raises(LoadError, match=f"(?s){words}"):
        memsave.load_adapter(model, tmp_path, adapter_name="other")
    assert same(weights(model), before) and torch.equal(model(X), out)
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    assert list(model.peft_config) == ["default"] and len(layers(model)) == 1
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("place", [-1, 12])
def test_pefts_own_checkpoints_that_are_damaged(place: int, tmp_path: Path, unchanged: Any) -> None:
    peft_shira(tmp_path)
    edited(lambda t: t["base_model.model.q.shira_indices"][0].__setitem__(3, place))(tmp_path)
    model = unchanged(plain_toy())
    with pytest.raises(LoadError, match="q: positions outside of its 12 x 12 weight. The model was not changed"):
        memsave.load_adapter(model, tmp_path)


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    model = saved(tmp_path)
    with pytest.raises(ValueError, match="the name 'default' is taken"):
        memsave.load_adapter(model, tmp_path)


def test_pefts_own_loader_names_what_does_not_fit(tmp_path: Path) -> None:
    saved(tmp_path)
    edited(flip)(tmp_path)
    with pytest.raises(LoadError, match="k: .*mask.*Nothing was loaded"):
        peft.PeftModel.from_pretrained(plain_toy(), str(tmp_path))


def three(**settings: Any) -> Any:
    """Adapters A, B and C with overlapping masks, A active."""
    model = peft.get_peft_model(plain_toy(), config(density=0.4, seed=1), adapter_name="A")
    for seed, name in enumerate("BC", 2):
        model.add_adapter(name, config(density=0.3, seed=seed))
    for name in "ABC":
        randomize(model, name, seed=ord(name))
    return model


def test_fusion_does_not_depend_on_the_order_and_is_a_sum(tmp_path: Path) -> None:
    model = three()
    parts = {"A": 0.3, "B": -1.7, "C": 0.9}
    for number, order in enumerate(permutations(parts)):
        memsave.fuse_adapters(model, {name: parts[name] for name in order}, f"fused{number}")
    assert model.active_adapters == ["A"]
    for layer in layers(model):
        first, *others = (layer.memsave_shira_values[f"fused{i}"] for i in range(6))
        assert all(torch.equal(first, other) for other in others) and not first.requires_grad
        union = set().union(*(indices(layer, name).tolist() for name in parts))
        assert indices(layer, "fused0").tolist() == sorted(union)
        dense = sum(w * layer.get_delta_weight(name).to_dense() for name, w in parts.items())
        torch.testing.assert_close(layer.get_delta_weight("fused0").to_dense(), dense)
    model.set_adapter("fused3")
    model.save_pretrained(str(tmp_path), selected_adapters=["fused3"])
    again = peft.PeftModel.from_pretrained(plain_toy(), str(tmp_path / "fused3"))
    assert torch.equal(again(X), model(X))
    assert same(weights(model.unload()), weights(plain_toy()))


def test_a_fused_adapter_equals_both_active() -> None:
    model = three()
    memsave.fuse_adapters(model, {"B": 1.0, "A": 1.0})
    model.base_model.set_adapter(["A", "B"])
    both = model(X)
    model.set_adapter("fused")
    torch.testing.assert_close(model(X), both)
    model.set_adapter("A")
    assert not torch.allclose(model(X), both)


@pytest.mark.parametrize(
    ("weights_", "name", "words"),
    [
        ({}, "fused", "expected names of adapters among .'A', 'B', 'C'."),
        ({"A": 1, "d": 2}, "fused", "got .'d'."),
        ({"A": 1}, "B", "'B' is taken"),
    ],
    ids=["none", "unknown", "taken"],
)
def test_wrong_fusions(weights_: dict[str, float], name: str, words: str) -> None:
    model = three()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=words):
        memsave.fuse_adapters(model, weights_, name)
    assert list(model.state_dict()) == before and sorted(model.peft_config) == ["A", "B", "C"]
    with pytest.raises(memsave.MemsaveError, match="no SHiRA adapters"):
        memsave.fuse_adapters(plain_toy(), {"A": 1.0})


def test_overlap() -> None:
    """AWOM is the largest singular value of A1^T A2, AWOR its share of zeros."""
    model = three()
    found = adapter_overlap(model, "A", "B")
    assert [path.split(".")[-1] for path in found] == ["q", "k", "v", "out"]
    for layer, (awom, awor) in zip(layers(model), found.values(), strict=True):
        a, b = (layer.get_delta_weight(name).detach().to_dense().double() for name in "AB")
        product = a.T @ b
        assert awom == pytest.approx(float(torch.linalg.matrix_norm(product, 2)), rel=1e-6)
        assert awor == pytest.approx(1 - float((product != 0).double().mean()))
    with pytest.raises(ValueError, match="got .'z'."):
        adapter_overlap(model, "A", "z")
