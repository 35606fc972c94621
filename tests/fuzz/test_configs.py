"""Configs with any values in any fields: they are made, and survive JSON, or refused by the name of a field."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memsave
from memsave import MethodConfig
from memsave.methods import METHODS

from .examples import atoms, examples, json_values

pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")

ADAPTERS = [memsave.SHiRAConfig, memsave.LaMDAConfig]
# Of PEFT itself, which takes anything there.
_OF_PEFT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
_OF_PEFT |= {"inference_mode", "modules_to_save", "layers_to_transform", "layers_pattern"}
_WORDS = sorted(
    {"uniform", "energy", "activation", "none", "all", "elementwise", "block", "token", "ema", "fit", "measure"}
    | {"contiguous", "coactivation", "stream", "patch", "pps", "crs", "sample_cache", "random", "magnitude", "given"}
    | {"stored", "select", "float32", "bfloat16", "float8_e4m3fn", "int8", "exact", "randomized", "added", "auto"}
)
values = st.sampled_from(_WORDS) | json_values | atoms | st.lists(st.text(max_size=5), max_size=3).map(tuple)


def own_fields(cls: Any) -> list[str]:
    return [f.name for f in fields(cls) if f.name not in _OF_PEFT and not f.name.startswith("calibration")]


def drawn(data: st.DataObject, cls: Any) -> dict[str, Any]:
    """A few fields; targets that are right more often than not, since most configs need them."""
    names = own_fields(cls)
    chosen = data.draw(st.dictionaries(st.sampled_from(names), values, max_size=4) if names else st.just({}))
    if "target_modules" in names and data.draw(st.integers(0, 4)):
        chosen["target_modules"] = ["q_proj"]
    return chosen


def made(cls: Any, settings: dict[str, Any]) -> Any:
    """The config, or None where it is refused as it should be: with the name of a field and of the class."""
    try:
        return cls(**settings)
    except (ValueError, TypeError) as error:
        assert any(name in str(error) for name in [*settings, *own_fields(cls)]), error
        assert cls.__name__ in str(error), error
        return None


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
@examples(60)
@given(data=st.data())
def test_methods(cls: type[MethodConfig], data: st.DataObject) -> None:
    config = made(cls, drawn(data, cls))
    if config is not None:
        back = MethodConfig.from_json(config.to_json())
        assert back == config and type(back) is cls
        assert str(back) == str(config) and hash(back) == hash(config)


@pytest.mark.parametrize("cls", ADAPTERS, ids=lambda cls: cls.__name__)
@examples(60)
@given(data=st.data())
def test_adapters(cls: Any, data: st.DataObject) -> None:
    config = made(cls, drawn(data, cls))
    if config is not None:
        method = config.as_method()
        back = MethodConfig.from_json(method.to_json())
        assert back == method
        assert json.loads(back.to_json()) == json.loads(method.to_json())
