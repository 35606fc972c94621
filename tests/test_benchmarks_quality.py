"""The benchmarks of WTA-CRS's quality: they resume, compare by seed, and the docs show what the result files hold."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the benchmark trains the demo's model: pip install 'memsave[bench]'")
pytest.importorskip("matplotlib", reason="the benchmark draws a picture: pip install 'memsave[bench]'")

from benchmarks import grad_norms, quality
from benchmarks.quality import LINEARS, SAMPLED, Trained

from .methods.test_wta_crs import pps_variance, rows_and_gradients

PAGE = (
    "before\n<!-- quality -->\n<!-- end of quality -->\n<!-- grad_norms -->\nold\n<!-- end of grad_norms -->\nafter\n"
)


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    """The options of a run that takes seconds, with all outputs in one folder."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        (text / f"{number:02}.txt").write_text(f"line of file {number}\n" * 20)
    (tmp_path / "page.md").write_text(PAGE)
    return [
        "--size",
        "tiny",
        "--text",
        str(text),
        "--out",
        str(tmp_path / "out.json"),
        "--page",
        str(tmp_path / "page.md"),
    ]


def test_a_quality_run_goes_on_where_it_was(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # holds for the whole process
    options = [*toy, "--steps", "6", "--plot", str(tmp_path / "plot.png")]
    train, stopped = quality.train, []

    def once(*args: Any) -> Trained:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(args)
        return train(*args)

    monkeypatch.setattr(quality, "train", once)
    with pytest.raises(KeyboardInterrupt):
        quality.main([*options, "--seeds", "1"])
    first = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [run["variant"] for run in first] == ["plain"]

    monkeypatch.setattr(quality, "train", train)
    quality.main([*options, "--seeds", "1"])
    data = json.loads((tmp_path / "out.json").read_text())
    runs = [Trained(**run) for run in data["runs"]]
    assert asdict(runs[0]) == first[0]
    assert [(run.linears, run.variant) for run in runs] == quality.VARIANTS
    assert len({run.validation_loss for run in runs}) == len(runs), "a variant that trains like another one"
    for run in runs:
        assert len(run.training_losses) == 2 and run.training_losses[1] < run.training_losses[0]
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    page = (tmp_path / "page.md").read_text()
    assert quality.table(data) in page and "old" in page and page.startswith("before\n")

    monkeypatch.delattr(quality, "train")
    quality.main([*options, "--seeds", "1"])  # complete: trains nothing
    before = (tmp_path / "out.json").read_text()
    with pytest.raises(ValueError, match=r"its runs have settings .*'steps': 6.* It was not changed"):
        quality.main([*options, "--steps", "7", "--seeds", "1"])
    assert (tmp_path / "out.json").read_text() == before


def test_the_table_compares_with_plain_of_the_same_seed() -> None:
    losses = {"plain": [2.0, 3.0], "pps 0.3": [2.1, 3.3], "wta_crs 0.3": [2.5, 2.5], "pps 0.1": [4.0, 4.0]}
    runs = [
        Trained(linears=linears, variant=variant, seed=seed, training_losses=[], validation_loss=losses[variant][seed])
        for linears, variant in quality.VARIANTS
        for seed in (1, 0)
    ]
    settings = {"size": "tiny", "steps": 6, "batch": 4, "length": 32}
    versions = {"torch": "1", "transformers": "2"}
    data = {"settings": settings, "versions": versions, "text": {"source": "text"}, "runs": [asdict(r) for r in runs]}
    lines = quality.table(data).splitlines()
    assert lines[2] == "| none | plain | 2.500 (2.000 to 3.000) |  |"
    assert lines[3] == "| down_proj | pps 0.3 | 2.700 (2.100 to 3.300) | +0.200 (+0.100 to +0.300) |"
    assert lines[4] == "| down_proj | wta_crs 0.3 | 2.500 (2.500 to 2.500) | +0.000 (-0.500 to +0.500) |"
    assert lines[-1].startswith("2 seeds, 6 steps of 4 x 32 bytes")


def test_the_variance_is_the_closed_form_that_draws_were_compared_with() -> None:
    x, dy = rows_and_gradients("log-normal", "gaussian")
    weights = x.norm(dim=1) * dy.norm(dim=1)
    expected = pps_variance(x, dy, 76, weights) / (dy.t() @ x).square().sum()
    assert grad_norms.expected_variance(x, dy, weights, 76) == pytest.approx(float(expected), rel=1e-9)
    same = grad_norms.compared(x, dy, torch.ones(len(x)), dy.norm(dim=1))
    assert same["remembered"] == same["norms alone"] == 1.0 > same["best"]


def test_a_run_of_remembered_norms(toy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(grad_norms, "TRAININGS", {"still": (0, 0.0)})
    grad_norms.main([*toy, "--batches", "2", "--epochs", "2"])
    data = json.loads((tmp_path / "out.json").read_text())
    assert [r["linear"] for r in data["results"]] == [f"{k}_proj" for k in ("q", "k", "v", "o", "gate", "up", "down")]
    for result in data["results"]:  # nothing was learned in between, so the norms alone are the best there is
        if result["linear"] in ("o_proj", "down_proj"):  # whose memory is their own
            assert result["norms alone"] == pytest.approx(result["best"], rel=0.01)
            assert result["best"] < result["remembered"] < 1
    page = (tmp_path / "page.md").read_text()
    assert grad_norms.table(data) in page and "old" not in page


def test_the_docs_show_what_the_result_files_hold() -> None:
    page = quality.PAGE.read_text(encoding="utf-8")
    for module, block, path in ((quality, "quality", quality.RESULTS), (grad_norms, "grad_norms", grad_norms.RESULTS)):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert f"<!-- {block} -->" in page
        assert quality.filled(page, block, module.table(data)) == page
    runs = [Trained(**run) for run in json.loads(quality.RESULTS.read_text(encoding="utf-8"))["runs"]]
    seeds = {run.seed for run in runs}
    assert len(seeds) >= 3 and len(runs) == len(seeds) * (1 + len(LINEARS) * len(SAMPLED))
    assert quality.PLOT.stat().st_size > 10_000
