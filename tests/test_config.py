"""MethodConfig: data that is validated, hashable, immutable and survives JSON; and the matching rule."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memsave import FlashSVDConfig, Guarantee, MethodConfig, RecomputeNormConfig, WTACRSConfig
from memsave.config import TargetedConfig, matches
from memsave.methods import METHODS

from .toys import ToyAdapterConfig, ToyLowRankConfig, ToyRootConfig

part = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="."), min_size=1, max_size=5)
module_lists = st.lists(part, min_size=1, max_size=3)
regexes = st.sampled_from([r".*", r".*\.(up|down)_proj", r"layers\.\d+\.q", "ü", r"\Ax\Z"])
targets = module_lists | module_lists.map(tuple) | st.sets(part, min_size=1, max_size=3) | regexes
aim = {"target_modules": targets, "exclude_modules": st.none() | targets}

configs = st.one_of(
    st.builds(RecomputeNormConfig, target_modules=st.none() | targets, exclude_modules=st.none() | targets),
    st.builds(
        WTACRSConfig,
        keep_ratio=st.floats(0, 1, exclude_min=True) | st.just(1),
        min_rows=st.integers(1, 1 << 40),
        estimator=st.sampled_from(["pps", "wta_crs", "crs"]),
        **aim,
    ),
    st.builds(ToyLowRankConfig, rank=st.integers(1, 9), **aim),
    st.builds(ToyAdapterConfig, **aim),
    st.builds(ToyRootConfig, every=st.integers()),
)


@given(config=configs)
def test_json_and_back(config: MethodConfig) -> None:
    text = config.to_json()
    assert json.loads(text) == config.to_dict() and config.to_dict()["method"] == config.name
    back = MethodConfig.from_json(text)
    assert back == config and type(back) is type(config) and hash(back) == hash(config)
    assert MethodConfig.from_dict(config.to_dict()) == config
    assert back.to_json() == text


@given(config=configs)
def test_copies_are_equal(config: MethodConfig) -> None:
    assert copy.deepcopy(config) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_configs_are_told_apart_by_method_and_by_setting() -> None:
    made = [
        RecomputeNormConfig(),
        RecomputeNormConfig(target_modules=r".*"),
        ToyAdapterConfig(target_modules=r".*"),
        ToyLowRankConfig(target_modules=r".*"),
        ToyLowRankConfig(target_modules=r".*", rank=5),
        WTACRSConfig(target_modules=r".*"),
        WTACRSConfig(target_modules=r".*", keep_ratio=0.4),
    ]
    assert len(set(made)) == len(made)


def test_lists_sets_and_tuples_of_names_are_one_and_the_same() -> None:
    made = {WTACRSConfig(target_modules=kind(["a", "b"])) for kind in (list, tuple, set, frozenset)}
    assert {c.target_modules for c in made} == {("a", "b")}


@pytest.mark.parametrize("method", METHODS)
def test_configs_are_frozen_and_keyword_only(method: Any) -> None:
    needed = {"ratio": 0.5} if method is FlashSVDConfig else {}
    config = method(target_modules=r".*", **needed) if issubclass(method, TargetedConfig) else method()
    for name in ("target_modules", "any_other", *(f.name for f in fields(config))):
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, "x")
    with pytest.raises(TypeError, match="positional"):
        method(r".*")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("value", [0, 7, [0], [1, "a"], [], (), "", [""], {"a": 1}, True, b"q", nn.Linear(1, 1)])
def test_targets_that_are_not_names_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"WTACRSConfig\.{field}: expected a regular expression or a non-empty list"):
        WTACRSConfig(**{"target_modules": r".*", field: value})


def test_a_broken_regular_expression_is_shown_with_its_fault() -> None:
    with pytest.raises(ValueError, match=r"target_modules: '\(up' is not a regular expression: missing \), unterm"):
        RecomputeNormConfig(target_modules="(up")


@pytest.mark.parametrize("config", [WTACRSConfig, ToyAdapterConfig, ToyLowRankConfig])
def test_methods_that_change_results_must_be_aimed(config: Any) -> None:
    with pytest.raises(ValueError, match=rf"{config.__name__} changes results \({config.guarantee}\), so it must be"):
        config()


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan"), float("inf"), "0.3", None, True, 30, [0.3]])
def test_wrong_keep_ratios(ratio: Any) -> None:
    with pytest.raises(ValueError, match=r"WTACRSConfig\.keep_ratio: expected a fraction in \(0, 1\], got"):
        WTACRSConfig(target_modules=r".*", keep_ratio=ratio)


@pytest.mark.parametrize("rows", [0, -1, 1.5, "16", None, True])
def test_wrong_min_rows(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"WTACRSConfig\.min_rows: expected a whole number of at least 1, got"):
        WTACRSConfig(target_modules=r".*", min_rows=rows)


@pytest.mark.parametrize("estimator", ["PPS", "topk", "", None, 3, ["pps"]])
def test_wrong_estimators(estimator: Any) -> None:
    with pytest.raises(ValueError, match=r"estimator: expected one of \['pps', 'wta_crs', 'crs'\], got"):
        WTACRSConfig(target_modules=r".*", estimator=estimator)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"method": "wta"}, r"method 'wta' is unknown; expected one of \[.*'recompute_norm'.*'wta_crs'"),
        ({}, "method None is unknown"),
        ({"method": ["wta_crs"]}, r"method \['wta_crs'\] is unknown"),
        (
            {"method": "wta_crs", "target_modules": ".*", "ratio": 0.3},
            r"WTACRSConfig has no field \['ratio'\]; it has \['target_modules', 'exclude_modules', 'keep_ratio'",
        ),
        ({"method": "wta_crs", "target_modules": ".*", "keep_ratio": 3}, "expected a fraction"),
    ],
)
def test_wrong_data_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodConfig.from_dict(data)


def test_from_dict_leaves_its_argument_alone() -> None:
    data = {"method": "wta_crs", "target_modules": [".a"]}
    MethodConfig.from_dict(data)
    assert data == {"method": "wta_crs", "target_modules": [".a"]}


def test_text_shows_every_setting_that_is_not_none() -> None:
    assert str(RecomputeNormConfig()) == "RecomputeNormConfig()"
    text = str(WTACRSConfig(keep_ratio=0.5, target_modules=["q"]))
    assert (
        text == "WTACRSConfig(target_modules=('q',), keep_ratio=0.5, min_rows=16, estimator='pps', "
        "grad_norms='none', save_grad_norms=False)"
    )


def test_guarantees_read_as_words_and_as_json() -> None:
    assert [str(g) for g in Guarantee] == ["exact", "unbiased gradient", "adapter", "approximate"]
    assert json.dumps(Guarantee.EXACT) == '"exact"'


@given(entry=part, name=st.lists(part, min_size=1, max_size=4).map(".".join))
def test_a_list_entry_matches_a_name_or_a_dotted_suffix(entry: str, name: str) -> None:
    assert bool(matches((entry,), name)) == (entry == name or name.split(".")[-1] == entry)
    assert matches((entry,), f"{name}.{entry}") == [entry]
    assert not matches((entry,), f"{name}x{entry}x")
    assert not matches((entry,), f"{entry}.{name}.")


@given(name=st.lists(part, min_size=2, max_size=4))
def test_a_list_entry_may_hold_dots(name: list[str]) -> None:
    assert matches((".".join(name[1:]),), ".".join(name))


def test_a_string_matches_whole_names_only() -> None:
    assert matches("q_proj", "q_proj") == ["q_proj"]
    assert not matches("q_proj", "layers.0.q_proj") and not matches("q_proj", "q_proj.lora")
    assert not matches(r".*", "two\nlines") and matches(r"(?s).*", "two\nlines")


def test_the_base_classes_say_what_a_method_lacks() -> None:
    class Bare(TargetedConfig):
        guarantee = Guarantee.EXACT

    for call in ("convert", "restore", "candidate"):
        with pytest.raises(TypeError, match=rf"Bare does not define {call}\(module\)"):
            getattr(Bare(), call)(nn.Linear(1, 1))
