"""What fuzzing found in loading checkpoints and adapters, each as the smallest damage that showed it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave import LoadError
from tests.mlp import Unchanged

pytest.importorskip("peft", reason="needs peft and safetensors (pip install 'memsave[hf]')")
loading = pytest.importorskip("tests.fuzz.loading")
safetensors = pytest.importorskip("safetensors.torch")


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def with_state(files: dict[str, bytes], changed: dict[str, Any]) -> dict[str, bytes]:
    """The same files, with another state of the first module in memsave.json that has these entries."""
    record = json.loads(files["memsave.json"])
    states = (item["state"] for items in record["modules"].values() for item in items)
    next(state for state in states if changed.keys() <= state.keys()).update(changed)
    return {**files, "memsave.json": json.dumps(record).encode()}


def with_tensors(name: str, files: dict[str, bytes], change: Callable[[str, Any], Any]) -> dict[str, bytes]:
    tensors = {key: change(key, tensor) for key, tensor in safetensors.load(files[name]).items()}
    return {**files, name: safetensors.save(tensors)}


STATES = [
    ("flash_svd", {"rank": 10**12}, "rank: expected a whole number from 1 to 4"),
    ("flash_svd", {"rank": "2"}, "rank: expected a whole number from 1 to 4"),
    ("flash_svd", {"heads": 3}, "heads: expected a divisor of the 8 output features"),
    ("sparse_mha", {"codebook": [10**6] * 4}, "codebook: expected the sizes"),
    ("sparse_mha", {"dense_below": None}, "dense_below: expected a number of keys"),
    ("lamda", {"rank_pattern": 3}, "cannot make the model from what memsave.json says of it"),
]


@pytest.mark.parametrize(("kind", "state", "message"), STATES, ids=[f"{kind}-{state}" for kind, state, _ in STATES])
def test_states_that_are_none(
    kind: str, state: dict[str, Any], message: str, tmp_path: Path, unchanged: Unchanged
) -> None:
    files = with_state(loading.checkpoint(kind), state)
    with pytest.raises(LoadError, match=message):
        memsave.load(written(tmp_path, files), unchanged(loading._plain(kind)))


def first_twice(key: str, tensor: Any) -> Any:
    return tensor.index_fill(0, torch.tensor([1]), int(tensor[0])) if key.endswith("unit_order") else tensor


def mask_of_half(key: str, tensor: Any) -> Any:
    return tensor.half() if "memsave_shira_mask" in key else tensor


def other_mask(key: str, tensor: Any) -> Any:
    return tensor ^ 1 if "memsave_shira_mask" in key else tensor


def other_base(key: str, tensor: Any) -> Any:
    return tensor + 1 if key.endswith("base_layer.weight") else tensor


def whole_weights(key: str, tensor: Any) -> Any:
    return tensor.to(torch.int64) if key.endswith("weight") else tensor


VALUES = [
    ("routed_ffn", first_twice, "ffn: unit_order is no order of its"),
    ("shira", mask_of_half, "kind of number"),
    ("shira", other_mask, "mask"),
    ("lamda", other_base, "the base weight has other values"),
    ("exact", whole_weights, "of another kind of number in the file"),
]


@pytest.mark.parametrize(("kind", "change", "message"), VALUES, ids=[f"{k}-{c.__name__}" for k, c, _ in VALUES])
@pytest.mark.parametrize("onto_meta", [False, True])
def test_values_that_cannot_be(
    kind: str, change: Any, message: str, onto_meta: bool, tmp_path: Path, unchanged: Unchanged
) -> None:
    if kind == "lamda" and onto_meta:  # its factors are made from the weight, so a model without values is refused
        message = "on the meta device"
    files = with_tensors("model.safetensors", loading.checkpoint(kind), change)
    model = loading._plain(kind)
    with pytest.raises(LoadError, match=message) as caught:
        memsave.load(written(tmp_path, files), unchanged(model.to("meta") if onto_meta else model))
    assert str(caught.value).endswith("The model was not changed.")


@pytest.mark.parametrize("kind", ["shira", "lamda"])
def test_an_adapter_that_fails_midway_leaves_no_wrapper(kind: str, tmp_path: Path, unchanged: Unchanged) -> None:
    """The model was left with the wrapper of modules_to_save, and the error was an AttributeError."""
    files = loading.adapter(kind)
    config = json.loads(files["adapter_config.json"]) | {"modules_to_save": ["2", "up_proj"]}
    files = {**files, "adapter_config.json": json.dumps(config).encode()}
    with pytest.raises(LoadError):
        memsave.load_adapter(unchanged(loading._plain("shira")), written(tmp_path, files))


@pytest.mark.parametrize("change", [torch.Tensor.float, lambda indices: indices[:, 0], lambda indices: indices - 9])
def test_positions_of_pefts_shira_that_are_none(change: Any, tmp_path: Path, unchanged: Unchanged) -> None:
    def changed(key: str, tensor: Any) -> Any:
        return change(tensor).contiguous() if key.endswith("shira_indices") else tensor

    files = with_tensors("adapter_model.safetensors", loading.adapter("peft_shira"), changed)
    with pytest.raises(LoadError, match="missing or damaged|positions outside"):
        memsave.load_adapter(unchanged(loading._plain("shira")), written(tmp_path, files))


def test_a_config_of_an_adapter_is_never_taken_from_json() -> None:
    """`peft_config` is a field of the method, and was read like one that JSON may have."""
    with pytest.raises(ValueError, match="shira.peft_config: expected a SHiRAConfig, got 5"):
        memsave.MethodConfig.from_dict({"method": "shira", "settings": "{}", "peft_config": 5})


@pytest.mark.parametrize("settings", ["[", "[]", '{"r": 0}', '{"no_such": 1}', "[" * 100_000, 3])
def test_settings_of_an_adapter_that_are_none(settings: Any) -> None:
    with pytest.raises(ValueError, match="lamda.settings: expected those of a LaMDAConfig as JSON"):
        memsave.MethodConfig.from_dict({"method": "lamda", "settings": settings})


@pytest.mark.parametrize("name", ["SHiRAConfig", "LaMDAConfig"])
def test_targets_of_adapters_are_names(name: str) -> None:
    for value in (3, [["x"]], {"a": 1}):
        with pytest.raises(ValueError, match=f"{name}.target_modules: expected names of modules"):
            getattr(memsave, name)(target_modules=value)


@pytest.mark.parametrize("settings", [{"dtype": 3}, {"dtype": "float8_e4m3fn"}, {"counts": {"a": "b"}}])
def test_fields_of_shira_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"SHiRAConfig.{next(iter(settings))}: expected"):
        memsave.SHiRAConfig(target_modules=["q"], **settings)


def test_names_in_memsave_json_are_no_paths(tmp_path: Path, unchanged: Unchanged) -> None:
    """They are looked up in the model and in the file of weights, and nothing else is opened."""
    files = loading.checkpoint("exact")
    for field, names in (("modules", ["../../x", "/etc/passwd", ".."]), ("tied", ["../../x"])):
        for name in names:
            record = json.loads(files["memsave.json"])
            record[field][name] = record["modules"]["0"] if field == "modules" else "/etc/passwd"
            damaged = {**files, "memsave.json": json.dumps(record).encode()}
            model = unchanged(loading._plain("exact"))
            if field == "tied":  # of a tensor that is not in the file: nothing to tie
                memsave.load(written(tmp_path, damaged), loading._plain("exact"))
                continue
            with pytest.raises(LoadError, match=f"the model lacks '{name}'"):
                memsave.load(written(tmp_path, damaged), model)
