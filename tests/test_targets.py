"""Targets that lead to nothing: the message says why, and what it suggests works."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from memsave import NoMatchError, convert_model

from .mlp import Unchanged, make, wta

REFUSED_TARGETS = [
    (["up_porj"], r"target_modules: 'up_porj' matches no module \(did you mean 'up_proj'\?\)"),
    (r".*\.up_porj", r"matches no module \(did you mean r'\.\*\\\.up_proj'\?\)"),
    (r"(1|2).(up|down)_porj", r"matches no module \(did you mean r'\(1\|2\)\.down_proj'\?\)\. "),
    (r"\d+\.expert", r"matches no module\. wta_crs can"),
    (r"\d+up_porj", r"matches no module \(did you mean \['up_proj'\]\?\)"),
    (["up_proj", "router"], r"target_modules: 'router' matches no module\. wta_crs can convert: up_proj x2, down_proj"),
    ("up_proj", r"'up_proj' matches no module \(a string is a regular .* whole name; did you mean \['up_proj'\]\?\)"),
    ("up_porj", r"a regular expression for the whole name; did you mean \['up_proj'\]\?\)"),
    ("router", r"a regular expression for the whole name; a list holds names or endings\)"),
    ("all-linear", r"'all-linear' matches no module \('all-linear' is PEFT's shorthand; use r'\.\*'\)"),
    (["all-linear"], r"'all-linear' is PEFT's shorthand; use r'\.\*'"),
    ([r".*\.up_proj"], r"holds names or endings; for a regular expression pass the string r'\.\*\\\.up_proj'\)"),
    (["*_proj"], r"holds names or endings; for a regular expression pass the string r'\.\*_proj'\)"),
    (["(up|down)_proj"], r"for a regular expression pass the string r'\.\*\(up\|down\)_proj'\)"),
    (["(expert"], r"for a regular expression pass the string r'\.\*_proj'\)"),
    (["roj"], "'roj' matches no module"),
    (["0"], r"'0' matches only modules that wta_crs does not convert \(LayerNorm\)"),
    (r"1(\.act)?", r"that wta_crs does not convert \(MLP, SiLU\); it holds 1.up_proj, 1.down_proj\. wta_crs can"),
]


@pytest.mark.parametrize(("targets", "message"), REFUSED_TARGETS, ids=[str(t) for t, _ in REFUSED_TARGETS])
def test_a_target_that_leads_to_nothing_is_an_error(targets: Any, message: str, unchanged: Unchanged) -> None:
    with pytest.raises(NoMatchError, match=message) as caught:
        convert_model(unchanged(make()), wta(targets))
    assert str(caught.value).endswith("The model was not changed.")


class Linear(nn.Module):
    """Has the name of torch's linear, and holds several of them, as a LoRA layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(4, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4), "other": nn.Linear(2, 4)})


@pytest.mark.parametrize("targets", [["q_proj"], "q_proj"])
def test_a_namesake_of_a_torch_layer_is_told_apart_and_what_it_holds_can_be_targeted(
    targets: Any, unchanged: Unchanged
) -> None:
    model = nn.Sequential(*(nn.ModuleDict({"q_proj": Linear()}) for _ in range(2)))
    with pytest.raises(NoMatchError) as caught:
        convert_model(unchanged(model), wta(targets))
    held = ["q_proj.base_layer", "q_proj.lora_A.default", "q_proj.lora_B.default"]
    assert (
        f"'q_proj' matches only modules that wta_crs does not convert ({__name__}.Linear); it holds {', '.join(held)}."
    ) in str(caught.value)
    assert convert_model(model, wta(held), dry_run=True).count == 6


@pytest.mark.parametrize(
    ("classes", "shown"),
    [
        ([("Embedding", "mine")], "mine.Embedding"),
        ([("Own", "one"), ("Own", "two")], "one.Own, two.Own"),
        ([("Own", "one"), ("Other", "one")], "Other, Own"),
    ],
)
def test_classes_are_named_in_full_where_their_names_are_ambiguous(classes: list[tuple[str, str]], shown: str) -> None:
    model = nn.Sequential(*(type(name, (nn.Module,), {"__module__": module})() for name, module in classes))
    with pytest.raises(NoMatchError, match=re.escape(f"does not convert ({shown}). wta_crs can convert: none.")):
        convert_model(model, wta(r"\d"))


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        (["down_porj"], r"'down_porj' matches no module (did you mean 'down_proj'?)"),
        (["act", "nothing_alike"], "'nothing_alike' matches no module"),
        ("down_proj", "(a string is a regular expression for the whole name; did you mean ['down_proj']?)"),
        (r".*\.down_porj", r"'.*\\.down_porj' matches no module (did you mean r'.*\.down_proj'?)"),
    ],
)
def test_an_exclusion_that_matches_nothing_is_an_error(excluded: Any, message: str, unchanged: Unchanged) -> None:
    with pytest.raises(NoMatchError) as caught:
        convert_model(unchanged(make()), wta(exclude_modules=excluded))
    text = str(caught.value)
    assert text.startswith("WTACRSConfig.exclude_modules: ") and text.endswith(f"{message}. The model was not changed.")


def test_excluding_every_match_is_an_error_that_says_so(unchanged: Unchanged) -> None:
    with pytest.raises(NoMatchError, match="'up_proj' matches only what cannot be converted .every match is excluded"):
        convert_model(unchanged(make()), wta(["up_proj"], exclude_modules=r".*"))
