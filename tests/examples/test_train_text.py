"""The main job at toy size: its figures, its outputs, and what it does with wrong options."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the example trains a transformers model: pip install 'memsave[bench]'")
pytest.importorskip("matplotlib", reason="the example draws a picture: pip install 'memsave[bench]'")
pytest.importorskip("tqdm", reason="the example shows a progress bar: pip install 'memsave[bench]'")

import matplotlib.image
import train_text
from comparison import COLORS, Result, in_words, table

from memsave.memory.profile import MemoryProfile, Timeline

ROOT = Path(__file__).parents[2]
TOY = ["--size", "tiny", "--steps", "6", "--batch", "2", "--length", "32"]
VARIANTS = ["plain", "checkpoint", "exact", "all", "all+wta_crs"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number:02}.txt").write_text(f"line of file {number}\n" * 20)
    return folder


def run(folder: Path, out: Path, *options: str) -> tuple[dict[str, Any], str]:
    """What a run writes as JSON, and what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        train_text.main([*TOY, "--text", str(folder), "--out", str(out), *options])
    return json.loads((out / "results.json").read_text()), printed.getvalue()


@pytest.fixture(scope="module")
def job(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """All variants in one run: JSON, what was printed, and the folder of the outputs."""
    out = tmp_path_factory.mktemp("out")
    return *run(text_folder, out), out


def by_variant(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["variant"]: result for result in report["results"]}


def test_every_variant_trains_to_the_end(job: tuple[dict[str, Any], str, Path]) -> None:
    report, _, _ = job
    assert [result["variant"] for result in report["results"]] == VARIANTS
    for result in report["results"]:
        assert len(result["training_losses"]) == 6
        assert result["training_losses"][-1] < result["training_losses"][0]
        assert result["step_seconds"] > 0


def test_exact_variants_compute_what_plain_does_and_sampling_does_not(job: tuple[dict[str, Any], str, Path]) -> None:
    results = by_variant(job[0])
    plain = results["plain"]["training_losses"]
    for name in ("checkpoint", "exact", "all"):
        assert results[name]["training_losses"] == pytest.approx(plain, rel=1e-5)
        assert results[name]["validation_loss"] == pytest.approx(results["plain"]["validation_loss"], rel=1e-5)
    sampled = results["all+wta_crs"]["training_losses"]
    # The forward of the first step is exact; later losses follow from sampled gradients.
    assert sampled[0] == pytest.approx(plain[0], rel=1e-6)
    assert sampled[-1] != pytest.approx(plain[-1], rel=1e-5)


def test_bytes_are_ordered_as_the_methods_promise(job: tuple[dict[str, Any], str, Path]) -> None:
    kept = {name: result["kept_bytes"] for name, result in by_variant(job[0]).items()}
    assert kept["checkpoint"] < kept["all"] < kept["exact"] < kept["plain"]
    assert 0 <= kept["all+wta_crs"] - kept["all"] <= 2 * 8  # no rows, but for each of the two layers a seed
    peak = {name: result["peak_bytes"] for name, result in by_variant(job[0]).items()}
    assert peak["all"] <= peak["exact"] < peak["plain"] > peak["checkpoint"]


def test_the_measured_step_is_a_steady_one(job: tuple[dict[str, Any], str, Path]) -> None:
    model = train_text.build_model("tiny", 32, 0)
    weight_bytes = sum(p.numel() * 4 for p in model.parameters())
    for result in job[0]["results"]:
        profile = result["profile"]
        assert (profile["peak_bytes"], profile["saved_bytes"]) == (result["peak_bytes"], result["kept_bytes"])
        # AdamW keeps two moments for each weight and a 4-byte counter for each parameter.
        counters_bytes = 4 * len(list(model.parameters()))
        assert profile["by_category"]["optimizer"] == 2 * weight_bytes + counters_bytes
        assert {"forward", "backward", "optimizer"} <= set(profile["timeline"]["phase"])


def test_sampling_does_not_depend_on_random_numbers_drawn_between_steps(text_folder: Path, tmp_path: Path) -> None:
    options = train_text.parse_options([*TOY, "--text", str(text_folder), "--out", str(tmp_path)])
    batches = train_text.make_batches(options.data.train, 4, 2, 32, seed=0)

    def losses(drawn_between: int) -> list[float]:
        variant = train_text.Run("all+wta_crs", options)
        for index, batch in enumerate(batches):
            torch.rand(drawn_between)
            variant.step(index, batch)
        return variant.losses

    assert losses(drawn_between=0) == losses(drawn_between=5)


def test_some_variants_only(text_folder: Path, tmp_path: Path) -> None:
    report, printed = run(text_folder, tmp_path, "--variants", "exact", "checkpoint")
    assert [result["variant"] for result in report["results"]] == ["exact", "checkpoint"]
    assert "checkpoint peaks at" in printed and "plain" not in printed


def test_table_and_words_are_printed(job: tuple[dict[str, Any], str, Path]) -> None:
    report, printed, out = job
    lines = printed.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("variant "))
    assert [line.split()[0] for line in lines[start + 2 : start + 7]] == VARIANTS
    plain, checkpoint = report["results"][:2]
    ratio = checkpoint["kept_bytes"] / plain["kept_bytes"]
    assert f"{checkpoint['kept_bytes'] / 2**20:.1f} MiB  {ratio:.2f}x" in lines[start + 3]
    assert all(sentence in lines for sentence in report["in_words"])
    assert str(out / "results.png") in lines[-1]


def test_the_picture_shows_every_category_that_has_bytes(job: tuple[dict[str, Any], str, Path]) -> None:
    picture = matplotlib.image.imread(job[2] / "results.png")  # (height, width, RGBA) in [0, 1]
    assert picture.shape[0] > 500 and picture.shape[1] > 500
    pixels = (torch.from_numpy(picture)[..., :3] * 255).round().int()
    for name in ("weights", "gradients", "optimizer", "kept for backward"):
        color = torch.tensor([int(COLORS[name][i : i + 2], 16) for i in (1, 3, 5)])
        assert (pixels == color).all(-1).sum() > 500, name


def test_settings_are_written_down(job: tuple[dict[str, Any], str, Path]) -> None:
    report, _, _ = job
    assert report["settings"]["steps"] == 6 and report["settings"]["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__
    assert report["text"]["files"] == 12


def test_the_command_trains_on_the_standard_library(tmp_path: Path) -> None:
    command = [sys.executable, "examples/train_text.py", "--size", "tiny", "--steps", "3", "--variants", "plain"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--batch", "1", "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "text: Python" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["text"]["training_bytes"] > 1_000_000


def test_text_is_split_by_file_in_a_fixed_order(tmp_path: Path) -> None:
    for number in reversed(range(21)):
        (tmp_path / f"{number:02}.txt").write_bytes(b"%02d" % number)
    (tmp_path / "05.bin").write_bytes(b"\0binary")
    (tmp_path / "empty.txt").touch()
    text = train_text.read_text(tmp_path)
    assert bytes(text.validation.tolist()) == b"00\n10\n20"
    assert bytes(text.train.tolist()).split(b"\n") == [b"%02d" % n for n in range(21) if n % 10]
    assert text.files == 21


def test_batches_are_windows_of_the_text_and_the_same_for_a_seed() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    batches = train_text.make_batches(data, count=50, batch=3, length=90, seed=4)
    assert batches.shape == (50, 3, 90) and batches.dtype == torch.int64
    assert (batches.diff(dim=-1) == 1).all()
    assert set(batches[..., 0].flatten().tolist()) == set(range(11))
    assert torch.equal(batches, train_text.make_batches(data, 50, 3, 90, seed=4))
    assert not torch.equal(batches, train_text.make_batches(data, 50, 3, 90, seed=5))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    factors = [train_text.learning_rate_factor(index, 100) for index in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[10] == pytest.approx(1)
    assert factors[55] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)


def made_up(variant: str, peak_mib: float, kept_mib: float, step_seconds: float, loss: float) -> Result:
    categories = {"weights": 2 * 2**20, "gradients": 2**20, "optimizer": 4 * 2**20}
    profile = MemoryProfile(
        peak_bytes=int(peak_mib * 2**20),
        baseline_bytes=0,
        saved_bytes=int(kept_mib * 2**20),
        by_category=categories,
        by_module={},
        phase="backward",
        timeline=Timeline(event=[0], phase=["forward"], live_bytes={}),
    )
    return Result(variant, profile.peak_bytes, profile.saved_bytes, step_seconds, loss, [loss + 1, loss], profile)


def test_words_follow_from_the_figures() -> None:
    plain, exact = made_up("plain", 100, 50, 0.2, 2.0), made_up("exact", 80, 30, 0.22, 2.001)
    plain = dataclasses.replace(plain, training_losses=[3.0] * 11)
    exact = dataclasses.replace(exact, training_losses=[3.0] * 9 + [3.0001, 3.02])
    recomputed, sampled = made_up("all", 76, 24, 0.275, 2.1), made_up("all+wta_crs", 38, 12, 0.22, 2.15)
    recomputed = dataclasses.replace(recomputed, training_losses=[3.0] * 11)
    sentences = in_words([plain, exact, recomputed, sampled], 0.25)
    assert sentences[0].startswith(
        "exact peaks at 80% of plain's bytes and keeps 60% of its bytes for backward, at 1.10x"
    )
    assert "differ by 0.0001 at most in the first ten steps; training makes rounding grow, to 0.02" in sentences[3]
    assert sentences[4].startswith("all computes what plain does up to rounding: their training losses differ by 0 at")
    assert sentences[5] == (
        "What computing the MLPs again adds to exact: the peak changes by -5%, the bytes kept for backward by -20%, "
        "the step time by +25%, the validation loss by +0.0990."
    )
    assert sentences[6] == (
        "What sampling 25% of the rows adds to all: the peak changes by -50%, the bytes kept for backward by -50%, the "
        "step time by -20%, the validation loss by +0.0500."
    )
    assert sentences[7].startswith("7.0 MiB of plain's peak are weights") and len(sentences) == 8


def test_table_gives_ratios_to_the_first_variant() -> None:
    lines = table([made_up("checkpoint", 50, 10, 0.5, 2.0), made_up("exact", 75, 5, 0.25, 1.5)]).splitlines()
    assert lines[2].split() == "checkpoint 50.0 MiB 1.00x 10.0 MiB 1.00x 500 ms 1.00x 2.0000 +0.0000".split()
    assert lines[3].split() == "exact 75.0 MiB 1.50x 5.0 MiB 0.50x 250 ms 0.50x 1.5000 -0.5000".split()
    assert len({len(line) for line in lines if "MiB" in line}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "plan"], "argument --variants: invalid choice: 'plan'"),
        (["--variants", "plain", "plain"], "argument --variants: each may be given once, got plain plain"),
        (["--steps", "2"], "argument --steps: expected a whole number of at least 3, got '2'"),
        (["--batch", "-4"], "argument --batch: expected"),
        (["--batch", "many"], "argument --batch: expected a whole number of at least 1, got 'many'"),
        (["--length", "1"], "argument --length: expected a whole number of at least 2, got '1'"),
        (["--keep-ratio", "0"], "argument --keep-ratio: expected a number above 0 and at most 1, got '0'"),
        (["--keep-ratio", "1.5"], "argument --keep-ratio: expected a number above 0 and at most 1, got '1.5'"),
        (["--lr", "nan"], "argument --lr: expected a number above 0 and at most 1, got 'nan'"),
        (["--size", "huge"], "argument --size: invalid choice: 'huge'"),
        (["--device", "abacus"], "argument --device: 'abacus' cannot be used on this machine"),
        (["--text", "no/such/folder"], "argument --text: no/such/folder is not a folder"),
        (["--length", "100000"], "argument --text: the text has"),
    ],
)
def test_wrong_options_say_what_was_expected(
    options: list[str], message: str, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_text.main(["--text", str(text_folder), "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "only.txt").write_text("one file cannot be split")
    with pytest.raises(SystemExit):
        train_text.main(["--text", str(tmp_path)])
    assert "holds 1 text files; at least 2 are needed" in capsys.readouterr().err


def test_an_output_that_is_no_folder_is_refused(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit):
        train_text.main(["--text", str(text_folder), "--out", str(tmp_path / "taken")])
    assert "argument --out:" in capsys.readouterr().err


def test_a_result_holds_only_plain_data() -> None:
    result = made_up("plain", 1, 1, 1, 1)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["profile"]["phase"] == "backward"


def test_the_readme_shows_a_committed_run() -> None:
    """Its table and its sentences are those of benchmarks/results/cpu/demo.json, a run of `make demo`."""
    run = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "demo.json").read_text(encoding="utf-8"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table([SimpleNamespace(**result) for result in run["results"]]) in readme  # type: ignore[misc]
    words = " ".join(readme.split())
    assert [sentence for sentence in run["in_words"] if sentence not in words] == []
