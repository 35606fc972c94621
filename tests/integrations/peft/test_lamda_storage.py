"""What is on disk, what comes back, and what is refused with nothing loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from memsave.errors import LoadError
from memsave.integrations.peft.lamda import LaMDAConfig
from memsave.integrations.peft.lamda.fingerprint import make_record, sketch, weight_hash
from tests.test_docs import run_page

from .lamda_models import OUT, RANK, D, adapted, batch, block, config, layers, learn, llama, rows

FILE = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24 asks for a PEFT that is not released yet; its methods work with this one."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)


def saved(folder: Path, model: nn.Module | None = None, **given: Any) -> tuple[Path, Tensor]:
    """A trained adapter on disk, and what the model computes with it."""
    tuned = adapted(block() if model is None else model, **given)
    learn(tuned)
    tuned.save_pretrained(str(folder))
    return folder, tuned(rows(dtype=layers(tuned)[0].base_layer.weight.dtype))


def entries(folder: Path) -> dict[str, int]:
    """{last part of the name: count} of what is in the file."""
    names = [name.split("memsave_lamda_")[1].split(".")[0] for name in load_file(folder / FILE)]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ({}, {"B": 16, "S": 2, "record": 2}),
        ({"freeze_until": 0.0}, {"S": 2, "record": 2}),
        ({"save_factors": True}, {"A": 2, "B": 16, "S": 2, "record": 2}),
        ({"freeze_until": 0.0, "save_factors": True}, {"A": 2, "B": 16, "S": 2, "record": 2}),
        ({"ranks": "energy", "svd": "randomized"}, {"B": 16, "S": 2, "record": 2}),
    ],
)
def test_round_trip(tmp_path: Path, given: dict[str, Any], stored: dict[str, int], low_cpu_mem_usage: bool) -> None:
    tuned = adapted(**given)
    with torch.no_grad():
        for layer in layers(tuned):
            layer.memsave_lamda_S["default"].normal_()
            if layer.frozen_rows("default") == 0:
                layer.segments("default")[3].add_(0.1)
    expected = tuned(rows())
    tuned.save_pretrained(str(tmp_path))
    assert entries(tmp_path) == stored
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    loaded = peft.PeftModel.from_pretrained(block(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(rows()), expected)
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    assert not any(p.requires_grad for p in loaded.parameters())
    again = peft.PeftModel.from_pretrained(block(), str(tmp_path), is_trainable=True)
    flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_dtypes_come_back(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    folder, expected = saved(tmp_path, block(torch.bfloat16), dtype="float32")
    model = block(torch.bfloat16)
    loaded = peft.PeftModel.from_pretrained(model, str(folder), low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(rows(dtype=torch.bfloat16)), expected)
    tensors = [*loaded.named_parameters(), *loaded.named_buffers()]
    found = {tensor.dtype for name, tensor in tensors if "memsave_lamda" in name and "record" not in name}
    assert found == {torch.float32}


def test_loading_reports_nothing_missing(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, freeze_until=0.0)
    model = adapted(freeze_until=0.0)
    result = model.load_adapter(str(folder), "again")
    assert result.missing_keys == [] and result.unexpected_keys == []


def test_several_adapters(tmp_path: Path) -> None:
    tuned = adapted()
    tuned.add_adapter("other", config(r=3, target_modules=["up"]))
    learn(tuned)
    outputs = {}
    for name in ("default", "other"):
        tuned.set_adapter(name)
        outputs[name] = tuned(rows())
    tuned.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(block(), str(tmp_path))
    loaded.load_adapter(str(tmp_path / "other"), "0")  # also the name of a segment, if these were numbers
    loaded.load_adapter(str(tmp_path), "third")
    for name, expected in (("default", "default"), ("0", "other"), ("third", "default")):
        loaded.set_adapter(name)
        assert torch.equal(loaded(rows()), outputs[expected])
    loaded.save_pretrained(str(tmp_path / "twice"))
    assert entries(tmp_path / "twice") == entries(tmp_path)
    loaded.delete_adapter("third")
    loaded.set_adapter("0")
    assert torch.equal(loaded(rows()), outputs["other"])
    with loaded.disable_adapter():
        assert torch.equal(loaded(rows()), block()(rows()))


@pytest.mark.parametrize("given", [{}, {"freeze_until": 0.0}, {"save_factors": True}, {"dtype": "float32"}])
def test_through_transformers(tmp_path: Path, given: dict[str, Any]) -> None:
    """model.add_adapter, save_pretrained, load_adapter, and across to PeftModel."""
    model = llama(torch.bfloat16)
    model.add_adapter(config(r=4, target_modules=["q_proj", "down_proj"], **given))
    learn(model, only_what_trains=True)
    expected = model(**batch()).logits
    model.save_pretrained(str(tmp_path))
    loaded = llama(torch.bfloat16)
    loaded.load_adapter(str(tmp_path), adapter_name="mine")
    assert torch.equal(loaded(**batch()).logits, expected)
    dtypes = {p.dtype for name, p in loaded.named_parameters() if "memsave_lamda" in name}
    assert dtypes == {torch.float32 if given.get("dtype") else torch.bfloat16}
    wrapped = peft.PeftModel.from_pretrained(llama(torch.bfloat16), str(tmp_path))
    assert torch.equal(wrapped(**batch()).logits, expected)
    if "freeze_until" in given:
        trained = llama(torch.bfloat16)
        trained.load_adapter(str(tmp_path), is_trainable=True)
        assert {n.split(".")[-2] for n, p in trained.named_parameters() if p.requires_grad} == {"memsave_lamda_S"}


def test_a_bfloat16_adapter_serves_the_same_base_in_float32(tmp_path: Path) -> None:
    folder, expected = saved(tmp_path, block(torch.bfloat16))
    loaded = peft.PeftModel.from_pretrained(block(torch.bfloat16).float(), str(folder))
    torch.testing.assert_close(loaded(rows()), expected.float(), rtol=0.05, atol=0.05)
    folder, _ = saved(tmp_path / "wide")
    with pytest.raises(LoadError, match="other values .* and was torch.float32, here it is torch.bfloat16"):
        peft.PeftModel.from_pretrained(block(torch.bfloat16), str(folder))


def tampered(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)


def key(part: str) -> str:
    return f"base_model.model.up.memsave_lamda_{part}"


def _set(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key(part): value})


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "no S": (lambda t: t.pop(key("S")), "up.memsave_lamda_S.default is missing"),
    "no segment": (lambda t: t.pop(key("B.rows5")), "up.memsave_lamda_B.default.rows5 is missing"),
    "no record": (lambda t: t.pop(key("record")), "up: its record is missing"),
    "S of another rank": (
        _set("S", torch.zeros(3, 3)),
        r"expected floating point \[12, 12\], got .*\[3, 3\]",
    ),
    "S of integers": (_set("S", torch.zeros(RANK, RANK, dtype=torch.int64)), "S.default: expected floating point"),
    "an unknown entry": (_set("C", torch.zeros(3)), "memsave_lamda_C has no place in the model"),
    "a segment too many": (_set("B.rows8", torch.zeros(1, OUT)), "rows8 has no place in the model"),
    "a short record": (_set("record", torch.zeros(3, dtype=torch.int32)), "up: its record is damaged"),
    "a record of zeros": (_set("record", torch.zeros(8 + RANK, dtype=torch.int32)), "its record has version 0"),
    "another hash": (lambda t: t[key("record")][5].add_(1), "up: the base weight has other values"),
    "another shape": (lambda t: t[key("record")][2].add_(1), r"up: the base weight had shape \[41, 24\]"),
    "another sketch": (lambda t: t[key("record")][9].add_(1 << 20), "up: the singular vectors come out differently"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_and_the_model_left_as_it_was(tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    folder, _ = saved(tmp_path)
    tampered(folder, change)
    base = block()
    modules, expected = list(base.modules()), base(rows())
    with pytest.raises(LoadError, match=f"the adapter was taken out of the model again(.|\n)*{message}"):
        peft.PeftModel.from_pretrained(base, str(folder))
    assert list(base.modules()) == modules and torch.equal(base(rows()), expected)
    assert all(p.requires_grad for p in base.parameters()) and not hasattr(base, "peft_config")


@pytest.mark.parametrize("case", ["no S", "another hash"])
def test_an_adapter_that_was_there_keeps_its_values(tmp_path: Path, case: str) -> None:
    """As when a Trainer resumes: the adapter is the user's own, and stays."""
    folder, _ = saved(tmp_path)
    tampered(folder, BROKEN[case][0])
    model = adapted()
    learn(model, seed=9)
    expected, state = model(rows()), copy.deepcopy(model.state_dict())
    with pytest.raises(LoadError, match="the adapter is as it was"):
        model.load_adapter(str(folder), "default", is_trainable=True)
    assert torch.equal(model(rows()), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(LoadError, match="taken out of the model again"):
        model.load_adapter(str(folder), "second")
    assert list(model.peft_config) == ["default"] and all(set(layer.r) == {"default"} for layer in layers(model))
    assert torch.equal(model(rows()), expected)


def test_another_base_is_refused_by_every_loader(tmp_path: Path) -> None:
    def other() -> Any:
        model = llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
        return model

    tuned = adapted(llama(), r=4, target_modules=["up_proj"])
    learn(tuned)
    tuned.save_pretrained(str(tmp_path))
    message = "layers.1.mlp.up_proj: the base weight has other values .* load that base model"
    for load in (lambda m: peft.PeftModel.from_pretrained(m, str(tmp_path)), lambda m: m.load_adapter(str(tmp_path))):
        model = other()
        modules, expected = list(model.modules()), model(**batch()).logits
        with pytest.raises(LoadError, match=message):
            load(model)
        assert list(model.modules()) == modules and torch.equal(model(**batch()).logits, expected)
        assert not model._hf_peft_config_loaded and all(p.requires_grad for p in model.parameters())
    # A state dict of the whole model, with torch alone.
    whole = adapted(llama(), r=4, target_modules=["up_proj"])
    whole.load_state_dict(tuned.state_dict())


def test_a_base_weight_that_is_loaded_brings_its_own_factors() -> None:
    tuned = adapted(block(), r=4)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * parameter.requires_grad)
    torch.manual_seed(9)
    other = block()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    loaded = adapted(other, r=4)
    loaded.load_state_dict(tuned.state_dict())
    assert torch.equal(loaded(rows()), tuned(rows()))


def test_saved_factors_do_not_depend_on_the_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the singular vectors come out rotated."""
    folder, expected = saved(tmp_path, save_factors=True)
    plain, _ = saved(tmp_path / "plain")
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m, **kw: (svd(m, **kw)[0].roll(1, 1), *svd(m, **kw)[1:]))
    loaded = peft.PeftModel.from_pretrained(block(), str(folder))
    assert torch.equal(loaded(rows()), expected)
    with pytest.raises(LoadError, match="the singular vectors come out differently .*save_factors=True"):
        peft.PeftModel.from_pretrained(block(), str(plain))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hash_sees_every_bit_the_order_and_the_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 53).to(dtype)
    expected = weight_hash(weight)
    assert torch.equal(weight_hash(weight.clone()), expected)
    assert torch.equal(weight_hash(weight.t().contiguous().t()), expected)
    bits = weight.clone().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    for index in ((0, 0), (36, 52), (11, 30)):
        changed = bits.clone()
        changed[index] ^= 1
        assert not torch.equal(weight_hash(changed.view(dtype)), expected)
    swapped = weight.clone()
    swapped[[0, 1]] = weight[[1, 0]]
    assert not torch.equal(weight_hash(swapped), expected)
    assert not torch.equal(weight_hash(weight.t().contiguous()), expected)


def test_hash_known_answer_and_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Python's integers; the same whatever the size of the pieces."""
    weight = torch.arange(-6, 6, dtype=torch.float32).view(3, 4)
    bits = weight.view(torch.int32).flatten().tolist()
    mask, sums = (1 << 64) - 1, [0, 0]
    for i, value in enumerate(bits):
        first = ((i * 0x9E3779B97F4A7C15) & mask) | 1
        signed = first - (1 << 64) if first >> 63 else first
        second = (((first ^ ((signed >> 29) & mask)) * 0xBF58476D1CE4E5B9) & mask) | 1
        sums = [(sums[0] + value * first) & mask, (sums[1] + value * second) & mask]
    assert [int(s) & mask for s in weight_hash(weight)] == sums
    expected = weight_hash(weight)
    monkeypatch.setattr("memsave.integrations.peft.lamda.fingerprint.CHUNK", 5)
    assert torch.equal(weight_hash(weight), expected)


def test_record_survives_casts() -> None:
    model = adapted()
    record = layers(model)[0].memsave_lamda_record["default"].clone()
    model.half()
    assert torch.equal(layers(model)[0].memsave_lamda_record["default"], record) and record.dtype == torch.int32
    a = layers(adapted())[0].memsave_lamda_A["default"]
    assert torch.equal(make_record(block().up.weight, a), record)
    assert sketch(a).abs().max() > 0.1 and a.shape == (D, RANK)


def test_rank_pattern_comes_back_without_spectra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, expected = saved(tmp_path, r=6, ranks="energy")
    stored = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(stored.values()) == 12
    monkeypatch.setattr("memsave.integrations.peft.lamda.ranks.energy", None)
    assert torch.equal(peft.PeftModel.from_pretrained(block(), str(folder))(rows()), expected)
    assert LaMDAConfig.from_pretrained(str(folder)).rank_pattern == stored


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"torch": torch, "model": llama(), "batches": [batch()] * 40}
    left = run_page("lamda.md", tmp_path, monkeypatch, **given)
    assert all(layer.frozen_rows("default") == 8 for layer in layers(left["model"]))
    assert peft.PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))(**batch()).loss < llama()(**batch()).loss
