"""The cases that train the demo's model: they go on where they were, and compare with plain of the same seed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run, tables
from benchmarks.cases.case import Case
from benchmarks.cases.quality import QUALITY_CASES, GradNormsCase, QualityCase
from benchmarks.plots import draw_quality
from benchmarks.result_files import FORMAT, RESULTS, read
from benchmarks.runners import grad_norms, quality

from ..methods.test_wta_crs import pps_variance, rows_and_gradients

QUALITY, GRAD_NORMS = QUALITY_CASES[:2]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text that is learned in a few steps."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"line of file {number}\n" * 20)
    return folder


@pytest.fixture
def run_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a case as the suite does, in the number of threads that there is: it holds for the whole process."""

    def run_suite(case: Case, *options: str) -> int:
        monkeypatch.setattr(run, "QUALITY_CASES", (case,))
        threads = str(torch.get_num_threads())
        return run.main(["--suite", "quality", "--threads", threads, "--out", str(tmp_path), *options])

    return run_suite


def test_a_case_goes_on_where_it_was_stopped(
    text: Path, run_suite: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, path = replace(QUALITY, text=text), tmp_path / "wta_crs_quality.json"
    assert isinstance(case, QualityCase)
    train, trained = quality.train, []

    def once(*args: Any) -> dict[str, Any]:
        if trained:
            raise KeyboardInterrupt
        trained.append(args)
        return train(*args)

    monkeypatch.setattr(quality, "train", once)
    with pytest.raises(KeyboardInterrupt):
        run_suite(case, "--tiny")
    first = read(path)
    assert [row["variant"] for row in first["results"]] == ["plain"] and first["tiny"]

    monkeypatch.setattr(quality, "train", train)
    assert run_suite(case, "--tiny") == 0
    data = read(path)
    rows = data["results"]
    assert rows[0] == first["results"][0]
    assert [(row["linears"], row["variant"]) for row in rows] == case.variants()
    assert len({row["validation_loss"] for row in rows}) == len(rows), "a variant that trains like another one"
    for row in rows:
        assert len(row["training_losses"]) == 2 and row["training_losses"][1] < row["training_losses"][0]
    steps = quality.train(replace(case, **case.tiny, steps_per_point=1), "none", "plain", 0)["training_losses"]
    assert rows[0]["training_losses"] == pytest.approx([sum(steps[:5]) / 5, steps[5]], abs=2e-5)


@pytest.fixture
def complete(text: Path, run_suite: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> QualityCase:
    """A case whose file lacks nothing, and which cannot train any more."""
    case = replace(QUALITY, text=text, **QUALITY.tiny)
    assert isinstance(case, QualityCase)
    figures = {"training_losses": [3.0, 2.0], "validation_loss": 2.0}
    names = ("linears", "variant", "seed")
    monkeypatch.setattr(quality, "train", lambda case, *run: dict(zip(names, run, strict=True)) | figures)
    assert run_suite(case) == 0
    monkeypatch.delattr(quality, "train")
    return case


def test_a_complete_file_keeps_its_date_and_machine(
    complete: QualityCase, run_suite: Callable[..., int], tmp_path: Path
) -> None:
    path = tmp_path / "wta_crs_quality.json"
    data = read(path)
    data["machine"] |= {"date": "2000-01-01", "cpu": "another"}
    path.write_text(json.dumps(data))
    assert run_suite(replace(complete, title="other words")) == 0
    assert read(path) == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 7}, r"were made with {'steps': 6}, this call has {'steps': 7}\. It was not changed"),
        ({"lr": 2e-3}, r"{'lr': 0.001}"),
        ({"text": None}, r"'training_bytes': 3"),
        ("tiny", r"{'tiny': False}, this call has {'tiny': True}"),
        ("torch", r"{'torch': '1.0'}"),
        ("format", r"result format 1 was found.*Nothing was changed.*remove the file first"),
    ],
)
def test_a_file_made_with_other_settings_is_refused(
    change: Any,
    message: str,
    complete: QualityCase,
    run_suite: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "wta_crs_quality.json"
    data = read(path)
    if change == "torch":
        data["machine"]["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(data | ({"format": 1} if change == "format" else {})))
    before = path.read_text()
    options = ["--tiny"] if change == "tiny" else []
    case = replace(complete, **change) if isinstance(change, dict) else complete
    assert run_suite(case, *options) == 1
    printed = capsys.readouterr().err
    assert str(path) in printed and "Traceback" not in printed
    assert path.read_text() == before
    assert re.search(message, printed), printed


def result_with(losses: dict[str, list[float]]) -> dict[str, Any]:
    """The content of a result file of two seeds, with these validation losses of each variant."""
    assert isinstance(QUALITY, QualityCase)
    rows = [
        {"linears": linears, "variant": variant, "seed": seed, "validation_loss": losses[variant][seed]}
        | {"training_losses": [2 * losses[variant][seed], losses[variant][seed]]}
        for seed in (1, 0)
        for linears, variant in QUALITY.variants()
    ]
    machine = {"date": "2000-01-01", "device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {"torch": "1"}}
    described = {"kind": "quality", "name": "x", "title": "losses", "size": "tiny", "steps": 6, "steps_per_point": 3}
    case = described | {"batch": 4, "length": 32, "text": {"source": "some text"}}
    return {"format": FORMAT, "tiny": False, "case": case, "machine": machine, "results": rows, "left_out": {}}


LOSSES = {"plain": [2.0, 3.0], "pps 0.3": [2.1, 3.3], "wta_crs 0.3": [2.5, 2.5], "pps 0.1": [4.0, 4.0]}


def test_the_table_compares_with_plain_of_the_same_seed() -> None:
    lines = tables.table(result_with(LOSSES)).splitlines()
    assert lines[2] == "| none | plain | 2.500 (2.000 to 3.000) |  |"
    assert lines[3] == "| down_proj | pps 0.3 | 2.700 (2.100 to 3.300) | +0.200 (+0.100 to +0.300) |"
    assert lines[4] == "| down_proj | wta_crs 0.3 | 2.500 (2.500 to 2.500) | +0.000 (-0.500 to +0.500) |"
    words = "Losses. The demo's tiny model, 2 seeds, 6 steps of 4 x 32 bytes, some text. a CPU, 1 thread, torch 1"
    assert lines[-1].startswith(words)


@pytest.mark.parametrize("count", [1, 2])
def test_a_case_that_was_stopped_has_a_table_and_a_plot(count: int) -> None:
    data = result_with(LOSSES)
    data["results"] = data["results"][:count]
    header, rule, *rows, empty, footnote = tables.table(data).splitlines()
    assert len(rows) == count
    assert len(draw_quality([data]).axes[0].lines) == count


def test_the_plot_shows_losses_and_differences() -> None:
    losses, _, differences, _ = draw_quality([result_with(LOSSES)]).axes
    drawn = {line.get_label().partition(" (")[0]: line for line in losses.lines}
    assert list(drawn) == list(LOSSES)
    assert drawn["pps 0.3"].get_xdata().tolist() == [1.5, 4.5]
    assert drawn["pps 0.3"].get_ydata().tolist() == pytest.approx([5.4, 2.7])
    assert differences.lines[1].get_ydata().tolist() == pytest.approx([0.4, 0.2])


def test_the_variance_is_the_closed_form_that_draws_were_compared_with() -> None:
    x, dy = rows_and_gradients("log-normal", "gaussian")
    weights = x.norm(dim=1) * dy.norm(dim=1)
    expected = pps_variance(x, dy, 76, weights) / (dy.t() @ x).square().sum()
    assert grad_norms.expected_variance(x, dy, weights, 76) == pytest.approx(float(expected), rel=1e-9)
    same = grad_norms.compared(x, dy, torch.ones(len(x)), dy.norm(dim=1), 0.3)
    assert same["remembered"] == same["norms alone"] == 1.0 > same["best"]


def test_a_run_of_remembered_norms(text: Path, run_suite: Callable[..., int], tmp_path: Path) -> None:
    case = replace(GRAD_NORMS, text=text, trainings={"still": (0, 0.0)})
    assert isinstance(case, GradNormsCase)
    assert run_suite(case, "--tiny") == 0
    data = read(tmp_path / "wta_crs_grad_norms.json")
    rows = data["results"]
    assert [row["linear"] for row in rows] == [f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")]
    for row in rows:  # nothing was learned in between, so the norms alone are the best there is
        if row["linear"] in ("o_proj", "down_proj"):  # whose memory is their own
            assert row["norms alone"] == pytest.approx(row["best"], rel=0.01)
            assert row["best"] < row["remembered"] < 1
    line = tables.table(data).splitlines()[2]
    means = [sum(row[way] for row in rows) / len(rows) for way in ("none", "remembered")]
    assert line.startswith(f"| still | 2 | {means[0]:.2f} (") and f" | {means[1]:.2f}x (" in line


def test_the_suite_is_not_part_of_the_default_run() -> None:
    assert run.parse_options(["--suite", "quality"]).cases == list(QUALITY_CASES)
    assert not {case.name for case in run.parse_options([]).cases} & {case.name for case in QUALITY_CASES}


def test_the_committed_results_are_complete_and_of_these_cases() -> None:
    assert isinstance(QUALITY, QualityCase)
    found = {case.name: read(RESULTS / "cpu" / f"{case.name}.json") for case in (QUALITY, GRAD_NORMS)}
    runs = [(row["seed"], row["linears"], row["variant"]) for row in found[QUALITY.name]["results"]]
    assert runs == [(seed, *variant) for seed in range(QUALITY.seeds) for variant in QUALITY.variants()]
    for case in (QUALITY, GRAD_NORMS):
        described, written = case.describe(), found[case.name]["case"]
        assert described | {"text": None} == written | {"text": None}  # which differs with the version of Python
