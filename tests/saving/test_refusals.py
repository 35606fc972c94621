"""What cannot be saved or loaded is refused with a reason; nothing is half written, and no model half loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import memsave
from memsave import LoadError, RecomputeNormConfig, SaveError

from ..mlp import Unchanged, make, wta
from ..snapshot import snapshot
from ..toys import ToyLowRankConfig

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors (pip install 'memsave[hf]')")
low_rank = ToyLowRankConfig(target_modules=["up_proj"])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a model with low-rank and recomputing layers."""
    model = make()
    memsave.convert_model(model, [low_rank, RecomputeNormConfig(exclude_modules=["up_proj"])])
    memsave.save(model, tmp_path / "saved")
    return tmp_path / "saved"


def edit(directory: Path, change: Callable[[Any], object]) -> None:
    record = json.loads((directory / "memsave.json").read_text())
    change(record)
    (directory / "memsave.json").write_text(json.dumps(record))


def newer_format(d: Path) -> None:
    edit(d, lambda record: record.update(format=2, memsave="9.0"))


def unknown_method(d: Path) -> None:
    edit(d, lambda record: record["configs"][0].update(method="teleport"))


def unknown_field(d: Path) -> None:
    edit(d, lambda record: record["configs"][0].update(strength=3))


def odd_ties(d: Path) -> None:
    edit(d, lambda record: record.update(tied="0.weight"))


def too_deep(d: Path) -> None:
    (d / "memsave.json").write_text("[" * 100_000)


def lost_entry(d: Path) -> None:
    edit(d, lambda record: record.pop("modules"))


def no_json(d: Path) -> None:
    (d / "memsave.json").write_text("{")


def no_record(d: Path) -> None:
    (d / "memsave.json").unlink()


def no_weights(d: Path) -> None:
    (d / "model.safetensors").unlink()


def cut_weights(d: Path) -> None:
    weights = (d / "model.safetensors").read_bytes()
    (d / "model.safetensors").write_bytes(weights[:-8])


DAMAGE = [
    (newer_format, r"has format 2, written by memsave 9.0; this memsave \S+ reads format 1. Install the memsave that"),
    (unknown_method, r"method 'teleport' is unknown; expected one of .* It was written by memsave"),
    (unknown_field, r"Config has no field \['strength'\]; it has .* It was written by memsave"),
    (lost_entry, r"memsave.json is damaged: KeyError\('modules'\)"),
    (odd_ties, r"memsave.json is damaged: AttributeError"),
    (too_deep, r"memsave.json is damaged: RecursionError"),
    (no_json, r"memsave.json is damaged: JSONDecodeError"),
    (no_record, r"holds no memsave.json, so memsave.save did not write it"),
    (no_weights, r"model.safetensors cannot be read: .*No such file"),
    (cut_weights, r"model.safetensors cannot be read: "),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damaged_checkpoints(damage: Callable[[Path], None], message: str, saved: Path, unchanged: Unchanged) -> None:
    damage(saved)
    with pytest.raises(LoadError, match=message) as caught:
        memsave.load(saved, unchanged(make()))
    assert str(caught.value).endswith("The model was not changed.")


def test_a_directory_that_is_not_there(tmp_path: Path, unchanged: Unchanged) -> None:
    with pytest.raises(LoadError, match="nowhere is not a directory"):
        memsave.load(tmp_path / "nowhere", unchanged(make()))


def wider(model: Any) -> None:
    model[1].down_proj = nn.Linear(8, 5)


def shorter(model: Any) -> None:
    del model[2]


def longer(model: Any) -> None:
    model.append(nn.Linear(4, 4))


def half(model: Any) -> None:
    model.to(torch.bfloat16)


def other_kind(model: Any) -> None:
    model[1].up_proj = nn.Conv1d(4, 8, 1)


def own_forward(model: Any) -> None:
    model[0].forward = lambda x: x


def tied(model: Any) -> None:
    model[1].down_proj.weight = model[2].down_proj.weight


def otherwise_converted(model: Any) -> None:
    memsave.convert_model(model, wta(["down_proj"]))


def partly_converted(model: Any) -> None:
    memsave.convert_model(model, low_rank)


def table_on_meta(model: Any) -> None:
    model.to("meta").register_buffer("table", torch.zeros(2, device="meta"), persistent=False)


MISFITS = [
    (
        wider,
        r"of another shape in the file: 1.down_proj.bias \[4\], not \[5\], 1.down_proj.weight \[4, 8\], not \[5, 8",
    ),
    (shorter, r"the model lacks '2.up_proj', which toy_low_rank converted"),
    (longer, r"does not fit the model: not in the file: 3.bias, 3.weight"),
    (half, r"of another dtype in the file \(see model.to\): 0.bias torch.float32, not torch.bfloat16, .* and 9 more"),
    (other_kind, r"toy_low_rank cannot convert 1.up_proj: it is of class Conv1d"),
    (own_forward, r"recompute_norm cannot convert 0: its forward was replaced on the instance"),
    (tied, r"tied in the model and not in the file: 1.down_proj.weight and 2.down_proj.weight"),
    (otherwise_converted, r"the model is converted already, and not as the saved one was; pass the plain model"),
    (partly_converted, r"the model is converted already, and not as the saved one was; pass the plain model"),
    (table_on_meta, r"on meta and not in any file: table"),
]


@pytest.mark.parametrize(("change", "message"), MISFITS, ids=[change.__name__ for change, _ in MISFITS])
def test_models_that_do_not_fit(change: Callable[[Any], None], message: str, saved: Path, unchanged: Unchanged) -> None:
    model = make()
    change(model)
    with pytest.raises(LoadError, match=message) as caught:
        memsave.load(saved, unchanged(model))
    assert str(caught.value).endswith("The model was not changed.")


def test_a_fault_in_the_middle_leaves_the_plain_model(saved: Path, unchanged: Unchanged) -> None:
    model = unchanged(make())
    edit(saved, lambda record: record["modules"]["2.up_proj"][0].update(state={}))
    with pytest.raises(LoadError, match="cannot make 2.up_proj from what memsave.json says of it, {}: KeyError"):
        memsave.load(saved, model)


class Refusing(nn.Sequential):
    """Takes no state that it did not make itself."""

    def get_extra_state(self) -> Any:
        return torch.zeros(1)

    def set_extra_state(self, state: Any) -> None:
        raise ValueError("the state is not mine")


def test_a_model_that_refuses_its_values_is_plain_again(tmp_path: Path) -> None:
    converted, model = (Refusing(nn.RMSNorm(4), nn.Linear(4, 4)) for _ in range(2))
    memsave.convert_model(converted)
    memsave.save(converted, tmp_path / "c")
    with pytest.raises(LoadError, match="does not take the values: .*the state is not mine"):
        memsave.load(tmp_path / "c", model)
    assert [type(module) for module in model] == [nn.RMSNorm, nn.Linear]


def test_only_models_of_transformers_are_made_by_load(saved: Path) -> None:
    with pytest.raises(
        LoadError, match=r"was not saved from a transformers model.*call memsave.load\('.*saved', model"
    ):
        memsave.load(saved)


@pytest.mark.parametrize("existing", ["note.txt", "memsave.json"])
def test_a_directory_in_use_is_left_alone(existing: str, tmp_path: Path) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(SaveError, match="is not empty; say overwrite=True .* Nothing was written"):
        memsave.save(make(), tmp_path)
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {existing: "mine"}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="file is a file; expected a directory"):
        memsave.save(make(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_overwriting_replaces_the_checkpoint_and_nothing_else(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("mine")
    model, plain = make(), make()
    memsave.save(model, saved, overwrite=True)
    memsave.load(saved, plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert sorted(f.name for f in saved.iterdir()) == ["memsave.json", "model.safetensors", "tokenizer.json"]
    assert (saved / "tokenizer.json").read_text() == "mine"
    assert [f.name for f in saved.parent.iterdir()] == ["saved"]


def test_nothing_leaves_a_directory_that_exists(saved: Path) -> None:
    """What is beside it may lie on another file system, where a move fails, or be closed to writing."""
    places: list[Path] = []
    write = safetensors.save_file
    with mock.patch.object(safetensors, "save_file", lambda t, path: (places.append(path), write(t, path))):
        memsave.save(make(), saved, overwrite=True)
    assert [path.parent.parent for path in places] == [saved]


def test_the_current_directory_and_links_are_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    memsave.save(make(), tmp_path / "link")
    monkeypatch.chdir(tmp_path / "real")
    memsave.save(make(), ".", overwrite=True)
    memsave.load(".", make())
    assert (tmp_path / "link").is_symlink() and {f.name for f in tmp_path.iterdir()} == {"link", "real"}


def test_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    memsave.save(make(), tmp_path / "c")
    memsave.load(tmp_path / "c", make())


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fault_while_writing_leaves_what_was_there(overwrite: bool, saved: Path, tmp_path: Path) -> None:
    target = saved if overwrite else tmp_path / "new" / "checkpoint"
    before = {f: f.read_bytes() for f in saved.iterdir()}
    with mock.patch.object(safetensors, "save_file", side_effect=OSError("disk full")), pytest.raises(OSError):
        memsave.save(make(), target, overwrite=overwrite)
    with mock.patch.object(Path, "write_text", side_effect=OSError("disk full")), pytest.raises(OSError):
        memsave.save(make(), target, overwrite=overwrite)
    assert {f: f.read_bytes() for f in saved.iterdir()} == before
    assert [f for f in target.parent.iterdir() if f != saved and f != tmp_path / "new"] == []


def test_a_checkpoint_that_is_half_replaced_cannot_be_loaded(saved: Path) -> None:
    with mock.patch.object(Path, "replace", side_effect=OSError("disk gone")), pytest.raises(OSError):
        memsave.save(make(), saved, overwrite=True)
    with pytest.raises(LoadError, match="holds no memsave.json"):
        memsave.load(saved, make())


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def sparse() -> nn.Module:
    module = make()
    module.register_buffer("table", torch.eye(3).to_sparse())
    return module


def wrapping_tensor() -> nn.Module:
    module = make()
    module[0].weight = nn.Parameter(TwoTensor(torch.ones(4), torch.zeros(4)))
    return module


def wide() -> nn.Module:
    module = make()
    module.register_buffer("table", torch.eye(3, dtype=torch.complex128))
    return module


class Pickled(nn.Linear):
    """Has state that is not a tensor."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}


UNFIT = [
    (lambda: make().to("meta"), r"0.weight: it is on the meta device and has no values"),
    (lazy, r"0.weight: it is made by the first forward; run the model once first"),
    (sparse, r"table: safetensors holds plain dense tensors, not torch.sparse_coo"),
    (wrapping_tensor, r"0.weight: safetensors holds plain dense tensors, not TwoTensor"),
    (wide, r"safetensors cannot write the weights: KeyError\(torch.complex128\)"),
    (lambda: nn.Sequential(Pickled(2, 2)), r"0._extra_state: expected a tensor, got dict; memsave writes no pickles"),
    (lambda: nn.DataParallel(make()), r"the model is wrapped in DataParallel; use the module inside: model.module"),
    (lambda: torch.compile(make()), r"the model is wrapped in OptimizedModule; use the module inside: model._orig_mod"),
    (lambda: "gpt2", r"expected a torch.nn.Module, got str"),
]


@pytest.mark.parametrize(("make_model", "message"), UNFIT)
def test_what_cannot_be_saved(make_model: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=message) as caught:
        memsave.save(make_model(), tmp_path / "new")
    assert str(caught.value).endswith("Nothing was written.")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrapped_models_are_not_loaded_into(wrap: Callable[[nn.Module], Any], saved: Path) -> None:
    model = wrap(make())
    before = snapshot(model)
    with pytest.raises(LoadError, match="the model is wrapped in .*; use the module inside"):
        memsave.load(saved, model)
    assert snapshot(model) == before


def test_safetensors_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for operation in (lambda: memsave.save(make(), tmp_path / "c"), lambda: memsave.load(tmp_path, make())):
        with pytest.raises(ImportError, match=r"memsave\.(save|load) needs safetensors: pip install 'memsave\[hf\]'"):
            operation()
    assert list(tmp_path.iterdir()) == []


def test_state_that_is_not_json_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    memsave.convert_model(model, low_rank)
    monkeypatch.setattr(ToyLowRankConfig, "module_state", lambda self, module: {"rank": torch.tensor(2)})
    with pytest.raises(SaveError, match="what module_state returned is not JSON data"):
        memsave.save(model, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
