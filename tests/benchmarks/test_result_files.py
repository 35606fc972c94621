"""Result files: what is wrong with one is said, the tables and plots of the docs are those of the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import plots, result_files, tables, take
from benchmarks.result_files import FORMAT, RESULTS, ResultError

STEP = RESULTS / "cpu" / "step_demo.json"
OP = RESULTS / "cpu" / "op_gather_rows.json"


def written(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def on_gpu(path: Path) -> dict[str, Any]:
    """A result as a GPU would give it."""
    data = result_files.read(path)
    data["machine"]["device"] = "NVIDIA H200"
    for row in data["results"]:
        if "variant" in row:
            row["allocator_peak_bytes"] = 2 * row["peak_bytes"]
    return data


def bundle(*results: dict[str, Any], **changed: Any) -> dict[str, Any]:
    named = {data["case"]["name"]: data for data in results}
    return {"format": FORMAT, "tiny": False, "left_out": {}, "results": named} | changed


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_of_the_docs_are_those_of_the_result_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.filled(text) == text


@pytest.mark.parametrize("plot", plots.all_plots(), ids=lambda plot: plot.path.name)
def test_the_plots_of_the_docs_are_those_of_the_result_files(plot: plots.Plot) -> None:
    assert plot.is_current()
    assert plot.path.stat().st_size < 100_000


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_committed_results_can_be_used(path: Path) -> None:
    if path.stem in result_files.OF_EXAMPLES:
        pytest.skip("written by an example, whose tests read it")
    data = result_files.read(path)
    assert data["case"]["name"] == path.stem and not data["tiny"]
    assert result_files.slug(data["machine"]["device"]) == path.parent.name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": 1}, f"result format 1 was found, this version of memsave reads format {FORMAT}.*make bench"),
        ({"results": []}, "result format None was found"),
        ([], "result format None was found"),
        ({"format": FORMAT, "tiny": False, "results": []}, "case, machine, left_out missing.*make bench"),
        ('{"format": 2, "ca', "not JSON.*Make it again"),
        (None, "there is no such result file. Make it"),
    ],
)
def test_a_file_of_no_use_is_refused_and_no_page_changes(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "<!-- results: cpu/x -->\nold\n<!-- end -->\n"
    page = written(tmp_path / "page.md", text)
    if content is not None:
        written(tmp_path / "cpu" / "x.json", content)
    with pytest.raises(ResultError, match=message) as caught:
        tables.filled(text, tmp_path)
    assert str(tmp_path / "cpu" / "x.json") in str(caught.value)

    monkeypatch.setattr(tables, "pages", lambda: [page])
    monkeypatch.setattr(tables, "filled", lambda text: (_ for _ in ()).throw(caught.value))
    assert tables.main() == 2
    assert page.read_text() == text and "No page was changed" in capsys.readouterr().err


def test_a_table_of_a_gpu(tmp_path: Path) -> None:
    data = on_gpu(STEP)
    written(tmp_path / "nvidia-h200" / "step.json", data)
    page = tables.filled("<!-- results: nvidia-h200/step -->\n<!-- end -->", tmp_path)
    header, _, plain, *_ = page.splitlines()[1:]
    assert header.endswith("allocator's peak |")
    assert plain.endswith(f"| {2 * data['results'][0]['peak_bytes'] / 2**20:.1f} MiB (1.00x) |")
    assert "NVIDIA H200, torch" in page and "thread" not in page


def test_an_aim_stands_beside_its_figure_where_it_applies() -> None:
    data = result_files.read(RESULTS / "cpu" / "sampled_weight_gradient.json")
    assert "Aim" not in tables.table(data)  # it is one for GPUs
    data["machine"]["device"] = "NVIDIA H200"
    data["results"] = [row for row in data["results"] if row["size"] == data["results"][0]["size"]]
    for ratio, verdict in ((0.40, "met"), (0.50, "missed")):
        for row in data["results"]:
            row["median_s"] = ratio if row["contender"] == "memsave" else 1.0
        words = f"takes at most 0.45x of dense dy.t() @ x; measured {ratio:.2f}x: {verdict}."
        assert words in tables.table(data)


def test_a_contender_without_figures_leaves_its_cell_empty() -> None:
    data = result_files.read(OP)
    gone = data["results"].pop()
    *_, row = [line for line in tables.table(data).splitlines() if line.startswith(f"| {gone['contender']} ")]
    assert row.endswith("| - |") and row.count("| - |") == 1


def test_plots_show_their_results(tmp_path: Path) -> None:
    for path in (STEP, OP):
        written(tmp_path / "results" / "nvidia-h200" / path.name, on_gpu(path))
    drawn = plots.all_plots(tmp_path / "results", tmp_path / "images")
    assert [plot.path.name for plot in drawn] == [f"nvidia-h200-{name}.png" for name in ("steps", "pareto", "ops")]
    for plot in drawn:
        assert not plot.is_current()
        plot.write()
        assert plot.is_current()
        assert min(Image.open(plot.path).size) > 150
    changed = on_gpu(STEP)
    changed["results"][1]["peak_bytes"] += 1
    written(tmp_path / "results" / "nvidia-h200" / STEP.name, changed)
    again = plots.all_plots(tmp_path / "results", tmp_path / "images")
    assert [plot.is_current() for plot in again] == [False, False, True]


def test_what_came_back_is_filed_under_its_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step, op = on_gpu(STEP), on_gpu(OP)
    written(tmp_path / "out" / "results.json", bundle(step))
    written(tmp_path / "out" / "tune.json", bundle(op))
    taken = take.take(tmp_path / "out", tmp_path / "results")
    folder = tmp_path / "results" / "nvidia-h200"
    assert taken == [folder / "step_demo.json", folder / "op_gather_rows.json"]
    assert result_files.read(taken[0]) == step and result_files.read(taken[1]) == op


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "result format 1 was found"),
        ({"results": []}, "no results by name"),
        ({"results": {"op_gather_rows": {"format": 1}}}, "results.json, op_gather_rows: result format 1"),
        ({"results": {"x": {"format": FORMAT}}}, "results.json, x: case, machine"),
        ({"results": {}}, "no result in results.json"),
        ("tiny", "from a dry run"),
        (None, "neither results.json nor tune.json"),
    ],
)
def test_what_cannot_be_used_is_not_taken(
    change: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = on_gpu(STEP), on_gpu(OP)
    if change == "tiny":
        written(tmp_path / "out" / "results.json", bundle(good, other | {"tiny": True}))
    elif change is not None:
        written(tmp_path / "out" / "results.json", bundle(good, other, **change))
    with pytest.raises(ResultError, match=message):
        take.take(tmp_path / "out", tmp_path / "results")
    assert not (tmp_path / "results").exists()
    assert take.main([str(tmp_path / "out")]) == 2
    assert "Nothing was taken" in capsys.readouterr().err
