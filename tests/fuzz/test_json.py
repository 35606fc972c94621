"""Any text where a config or memsave.json is expected: what it says, or a clear error, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memsave
from memsave import FlashSVDConfig, LoadError, MethodConfig, RecomputeNormConfig, RoutedFFNConfig, WTACRSConfig
from memsave.saving.record import read_record
from tests.mlp import make

from .examples import examples, json_values

pytest.importorskip("safetensors", reason="needs safetensors (pip install 'memsave[hf]')")
damage = pytest.importorskip("tests.fuzz.damage")
CONFIGS = [
    RecomputeNormConfig(target_modules=["a", "b"]),
    WTACRSConfig(target_modules=r".*\.q", keep_ratio=0.5),
    FlashSVDConfig(ratio=0.5, target_modules=["x"]),
    RoutedFFNConfig(target_modules=["x"], lora_rank=2, lora_alpha=3.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("json")


@pytest.fixture(scope="module")
def record(folder: Path) -> bytes:
    model = make()
    memsave.convert_model(model)
    memsave.convert_model(model, FlashSVDConfig(rank=2, target_modules=["up_proj"]))
    memsave.save(model, folder / "saved")
    return (folder / "saved" / "memsave.json").read_bytes()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
@examples(100)
@given(data=st.data())
def test_texts_of_configs(config: MethodConfig, data: st.DataObject) -> None:
    text = config.to_json().encode()
    how = data.draw(st.sampled_from([damage.damaged_json, damage.damaged_bytes]))
    try:
        back = MethodConfig.from_json(how(data.draw, text))
    except ValueError as error:
        assert str(error)
    else:
        assert MethodConfig.from_json(back.to_json()) == back


@examples(100)
@given(value=json_values)
def test_any_json_as_a_config(value: object) -> None:
    with pytest.raises(ValueError):
        MethodConfig.from_json(json.dumps(value))


@examples(200)
@given(data=st.data())
def test_texts_of_records(data: st.DataObject, record: bytes, folder: Path) -> None:
    how = data.draw(st.sampled_from([damage.damaged_json, damage.damaged_json, damage.damaged_bytes]))
    path = folder / "memsave.json"
    path.write_bytes(how(data.draw, record))
    try:
        read_record(folder)
    except LoadError as error:
        assert "The model was not changed." in str(error) and "memsave.json" in str(error)
