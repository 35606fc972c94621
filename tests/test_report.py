"""Report: a table to read, data to keep, names grouped into patterns, and no model."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import memsave
from memsave import NotAModelError, RecomputeNormConfig, Report, WTACRSConfig
from memsave.report import Row, Skip, group_skips, groups, pattern

from .toys import ToyRootConfig
from .trees import Tree, property_settings, trees


def expand(text: str) -> list[str]:
    """The names that a pattern stands for: `a.{0-1,3}.{q,k}_proj` -> a.0.q_proj, a.0.k_proj, a.1.q_proj, ..."""
    pieces = re.split(r"\{([^}]*)\}", text)  # literal, braces' content, literal, ...
    choices = [[piece] if i % 2 == 0 else _alternatives(piece) for i, piece in enumerate(pieces)]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _alternatives(content: str) -> list[str]:
    found = []
    for item in content.split(","):
        run = re.fullmatch(r"(\d+)-(\d+)", item)
        found += [str(n) for n in range(int(run[1]), int(run[2]) + 1)] if run else [item]
    return found


words = st.text("abq_", min_size=1, max_size=4)
numbers = st.integers(0, 30).map(str)
columns = st.one_of(
    words.map(lambda word: [word]),
    st.lists(numbers, min_size=1, max_size=6, unique=True),
    st.lists(words, min_size=1, max_size=4, unique=True),
)


@given(st.lists(columns, min_size=1, max_size=4))
def test_a_pattern_stands_for_just_its_names(columns: list[list[str]]) -> None:
    names = [".".join(parts) for parts in itertools.product(*columns)]
    assert sorted(expand(pattern(names))) == sorted(names)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lm_head"], "lm_head"),
        ([f"layers.{i}.{p}_proj" for i in (0, 1, 2, 3, 7) for p in "qk"], "layers.{0-3,7}.{q,k}_proj"),
        (["h.10.ln_1", "h.9.ln_1", "h.2.ln_1"], "h.{2,9-10}.ln_1"),
        (["0", "1"], "{0-1}"),
        (["up", "upup"], "up{,up}"),
        (["norm1", "norm2"], "norm{1,2}"),
        ([""], "(the model)"),
        (["a.00", "a.0"], "a.0{0,}"),
        (["a.²", "a.3"], "a.{²,3}"),
    ],
)
def test_patterns(names: list[str], expected: str) -> None:
    assert pattern(names) == expected


module_names = st.lists(words | numbers, min_size=1, max_size=3).map(".".join)


@given(st.lists(st.tuples(st.sampled_from("xy"), module_names), unique=True, max_size=12))
def test_groups_lose_no_name_and_mix_no_keys(pairs: list[tuple[str, str]]) -> None:
    grouped = [(key, name) for key, names in groups(pairs) for name in names]
    assert sorted(grouped) == sorted(pairs)
    for _, names in groups(pairs):
        assert set(names) <= set(expand(pattern(names)))
        for column in list(zip(*(name.split(".") for name in names), strict=True))[:-1]:
            assert len(set(column)) == 1 or all(part.isdecimal() for part in column), "only numbers may differ"


def blocks() -> Any:
    """Two blocks of a norm and two linears, an embedding, and experts that are one 3-D parameter."""
    model: Any = nn.Sequential(
        *(nn.ModuleDict({"norm": nn.RMSNorm(4), "q": nn.Linear(4, 4), "k": nn.Linear(4, 4)}) for _ in range(2))
    )
    model.add_module("emb", nn.Embedding(11, 4))
    experts = nn.Module()
    experts.up = nn.Parameter(torch.zeros(2, 4, 8))
    model.add_module("experts", experts)
    return model


def test_the_table() -> None:
    model = blocks()
    wta = WTACRSConfig(target_modules=["q"])
    memsave.convert_model(model, RecomputeNormConfig(target_modules=["norm"]))
    report = memsave.convert_model(model, [RecomputeNormConfig(target_modules=["norm"]), wta], dry_run=True)
    total = sum(p.numel() for p in model.parameters())
    lines = [line.split() for line in str(report).splitlines()]
    assert lines[0] == "memsave: 2 modules would be converted (dry run)".split()
    assert lines[1] == ["wta_crs", "{0-1}.q", "x2", "Linear", report.rows[0].backend, "unbiased", "gradient"]
    assert lines[2] == ["recompute_norm", "{0-1}.norm", "x2", "RMSNorm", report.already[0].backend, "exact,", "already"]
    assert lines[3] == "left as they are (share of the parameter bytes):".split()
    experts, embedding, keys = lines[4:]
    assert experts[:4] == [f"{64 / total:.1%}", "experts", "x1", "Module"]
    assert "holds 3-D parameters" in " ".join(experts)
    assert embedding[:4] == [f"{44 / total:.1%}", "emb", "x1", "Embedding"]
    assert keys[:4] == [f"{40 / total:.1%}", "{0-1}.k", "x2", "Linear"]


def test_what_was_left_says_whether_targets_or_kinds_were_the_reason() -> None:
    report = memsave.convert_model(blocks(), WTACRSConfig(target_modules=["q"]))
    reasons = {s.modules: s.reason for s in report.skipped}
    assert reasons["{0-1}.k"] == "not targeted"
    assert reasons["emb"] == reasons["{0-1}.norm"] == "not a kind that wta_crs converts"


def test_what_other_methods_converted_is_left_only_where_this_one_could_convert_it() -> None:
    model = blocks()
    memsave.convert_model(model)
    report = memsave.convert_model(model, WTACRSConfig(target_modules=["q"]))
    assert {s.modules: s.reason for s in report.skipped} == {
        "experts": "holds 3-D parameters: not a kind that wta_crs converts",
        "emb": "not a kind that wta_crs converts",
        "{0-1}.k": "not targeted",
    }


def test_a_report_looks_the_same_without_print() -> None:
    report = memsave.convert_model(blocks())
    assert repr(report) == str(report)


def test_cells_line_up() -> None:
    report = memsave.convert_model(blocks())
    rows = [line for line in str(report).splitlines() if line.startswith("  recompute_norm")]
    assert len(rows) == 2
    backends = [row.backend for row in report.rows]
    assert len({row.index("x") for row in rows}) == 1
    assert len({line.index(f" {backend} ") for line, backend in zip(rows, backends, strict=True)}) == 1


def row(method: str, modules: str = "a", backend: str = "torch", guarantee: str = "exact") -> Row:
    return Row(method, modules, 1, "Linear", backend, guarantee, "", (modules,))


@pytest.mark.parametrize(
    ("methods", "shown"),
    [
        (["share_mask"], "share_mask"),
        (["recompute_norm", "recompute_mlp"], "recompute_{norm,mlp}"),
        (["recompute_norm", "wta_crs"], "recompute_norm, wta_crs"),
        (["recompute_norm", "wta_crs", "recompute_mlp", "share_mask"], "recompute_{norm,mlp}, wta_crs, share_mask"),
        (["recompute_mlp", "recompute_mlp"], "recompute_mlp"),
    ],
)
def test_methods_on_the_same_modules_share_a_line(methods: list[str], shown: str) -> None:
    report = Report("converted", tuple(row(method) for method in methods))
    assert str(report).splitlines() == ["memsave: 1 module converted", f"  {shown}  a  x1  Linear  torch  exact"]


@pytest.mark.parametrize(
    "other", [{"modules": "b"}, {"backend": "native"}, {"guarantee": "unbiased gradient"}], ids=str
)
def test_methods_on_other_modules_kernels_or_terms_keep_their_lines(other: dict[str, str]) -> None:
    report = Report("converted", (row("recompute_norm"), row("recompute_mlp", **other), row("recompute_dropout")))
    first, second = str(report).splitlines()[1:]
    assert first.split() == ["recompute_{norm,dropout}", "a", "x1", "Linear", "torch", "exact"]
    assert second.split()[0] == "recompute_mlp" and set(" ".join(other.values()).split()) <= set(second.split())


def test_what_was_converted_before_is_not_joined_with_what_is_new() -> None:
    report = Report(
        "converted", rows=(row("recompute_mlp"),), already=(row("recompute_norm"), row("recompute_dropout"))
    )
    assert [line.split() for line in str(report).splitlines()[1:]] == [
        ["recompute_mlp", "a", "x1", "Linear", "torch", "exact"],
        ["recompute_{norm,dropout}", "a", "x1", "Linear", "torch", "exact,", "already"],
    ]


def test_joining_lines_changes_no_data() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    report = memsave.convert_model(model)
    assert "recompute_{norm,activation}" in str(report)
    assert [(row.method, row.modules) for row in report.rows] == [
        *[("recompute_norm", "0"), ("recompute_norm", "{1,3}")],
        *[("recompute_activation", "{1,3}"), ("recompute_activation", "2")],
    ]


def test_norms_name_the_kernels_that_serve_them() -> None:
    with memsave.ops.use_reference():
        report = memsave.convert_model(blocks(), dry_run=True)
        assert {row.kind: row.backend for row in report.rows} == {"RMSNorm": "reference", "Linear": "torch"}
    active = memsave.backends()["rms_norm"]["cpu"]["active"]
    report = memsave.convert_model(blocks())
    assert {row.kind: row.backend for row in report.rows} == {"RMSNorm": active, "Linear": "torch"}


def test_json_holds_what_the_report_holds() -> None:
    report = memsave.convert_model(blocks())
    data = json.loads(report.to_json())
    assert data["action"] == "converted" and data["count"] == report.count == 6
    assert [row["modules"] for row in data["rows"]] == [row.modules for row in report.rows]
    assert data["rows"][0]["names"] == list(report.rows[0].names)
    assert [s["share"] for s in data["skipped"]] == [s.share for s in report.skipped]
    assert data["devices"] == ["cpu"]
    assert data == json.loads(json.dumps(report.to_dict()))


def groups_of(report: Report) -> list[Row | Skip]:
    return [*report.rows, *report.skipped]


@settings(property_settings, max_examples=40)
@given(trees())
def test_every_module_with_parameters_is_a_row_or_a_skip(tree: Tree) -> None:
    report = memsave.convert_model(tree)
    rows = [name for row in groups_of(report) for name in row.names]
    holders = [name for name, m in tree.named_modules() if any(True for _ in m.parameters(recurse=False))]
    assert len(rows) == len(set(rows))
    assert set(holders) <= set(rows)
    for row in groups_of(report):
        assert row.count == len(row.names) > 0
    assert all(0 <= s.share <= 1 for s in report.skipped)
    assert [s.share for s in report.skipped] == sorted((s.share for s in report.skipped), reverse=True)
    json.loads(report.to_json())


def test_shares_count_a_shared_parameter_once_in_the_total() -> None:
    model: Any = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4, bias=False))
    model.add_module("head", nn.Linear(4, 6, bias=False))
    model.head.weight = model[0].weight
    (skip,) = memsave.convert_model(model).skipped
    assert (skip.modules, skip.share) == ("0", 24 / 40)


def test_skips_are_sorted_by_share() -> None:
    skipped = [("a", "K", "why", 0.125), ("b.0", "K", "why", 0.25), ("b.1", "K", "why", 0.25), ("c", "L", "no", 0.0)]
    rows = [(row.modules, row.count, row.share) for row in group_skips(skipped)]
    assert rows == [("b.{0-1}", 2, 0.5), ("a", 1, 0.125), ("c", 1, 0.0)]


def test_counts_modules_not_conversions() -> None:
    report = memsave.convert_model(blocks(), [RecomputeNormConfig(), WTACRSConfig(target_modules=r".*")])
    assert sum(row.count for row in report.rows) == 10 and report.count == 6


USES: list[Callable[[Any], object]] = [
    lambda model: model(torch.ones(1, 4)),
    lambda model: model.train(),
    lambda model: model.eval(),
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model: model.state_dict(),
    lambda model: model.to("cpu"),
    lambda model: model.cuda,
    lambda model: model.training,
    lambda model: model.config,
    lambda model: model.generate(),
    lambda model: model.save_pretrained("x"),
]


@pytest.mark.parametrize("use", USES)
def test_a_report_that_is_used_as_the_model_says_so(use: Callable[[Any], object]) -> None:
    model = memsave.convert_model(blocks(), ToyRootConfig())
    with pytest.raises(NotAModelError, match="convert_model works in place; do not assign its result to the model"):
        use(model)


def test_other_attributes_are_missing_as_usual() -> None:
    with pytest.raises(AttributeError, match="Report has no attribute 'colour'") as caught:
        _ = memsave.convert_model(blocks()).colour
    assert not isinstance(caught.value, NotAModelError)
    assert not hasattr(memsave.convert_model(blocks(), ToyRootConfig()), "train")


def test_reports_are_data() -> None:
    report = memsave.convert_model(blocks())
    assert copy.deepcopy(report) == pickle.loads(pickle.dumps(report)) == report
    assert isinstance(hash(report), int)
    assert report != Report(action="converted")
