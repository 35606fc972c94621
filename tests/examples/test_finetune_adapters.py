"""The example of adapters at toy size: its figures, its outputs, the text it reads, and wrong options."""

from __future__ import annotations

import contextlib
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
pytest.importorskip("peft", reason="the example makes adapters: pip install 'memsave[bench]'")
pytest.importorskip("matplotlib", reason="the example draws a picture: pip install 'memsave[bench]'")
pytest.importorskip("tqdm", reason="the example shows a progress bar: pip install 'memsave[bench]'")

import adapter_figures
import finetune_adapters
import matplotlib.image
import package_text
from adapter_figures import Result, in_words, table
from train_text import build_model

from memsave.memory.profile import MemoryProfile, Timeline

ROOT = Path(__file__).parents[2]
TOY = ["--size", "tiny", "--pretrain-steps", "2", "--steps", "10", "--batch", "2", "--length", "32"]
VARIANTS = ["full", "lora", "shira", "shira-gradient", "lamda"]


def write_texts(folder: Path, files: int = 21, lines: int = 60) -> None:
    """Texts of which no paragraph is like another."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in reversed(range(files)):
        paragraphs = [f"Paragraph {line} of document {number} says what it says.\n" for line in range(lines)]
        (folder / f"{number:02}.rst").write_text("\n".join(paragraphs))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder)
    return folder


@pytest.fixture(scope="module")
def job(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """All variants in one run: JSON, what was printed, and the folder of the outputs."""
    out, printed = tmp_path_factory.mktemp("out"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        finetune_adapters.main([*TOY, "--text", str(text_folder), "--out", str(out)])
    return json.loads((out / "results.json").read_text()), printed.getvalue(), out


def by_variant(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["variant"]: result for result in report["results"]}


def test_every_variant_learns_from_the_same_start(job: tuple[dict[str, Any], str, Path]) -> None:
    results = job[0]["results"]
    assert [result["variant"] for result in results] == VARIANTS
    assert [result["new_losses"][0][0] for result in results] == [0] * 5
    assert len({result["old_loss_before"] for result in results}) == 1
    for result in results:
        assert result["new_losses"][0][1] == pytest.approx(results[0]["new_losses"][0][1], rel=1e-6)
        assert result["new_losses"][-1][0] == 10
        assert result["new_losses"][-1][1] < result["new_losses"][0][1]
        assert result["step_seconds"] > 0


def test_figures_are_those_of_the_adapters(job: tuple[dict[str, Any], str, Path]) -> None:
    results = by_variant(job[0])
    model = build_model("tiny", 32, 0)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    lora = sum(16 * (m.in_features + m.out_features) for m in linears)
    trained = {name: result["trained_parameters"] for name, result in results.items()}
    assert trained["full"] == sum(p.numel() for p in model.parameters())
    assert trained["lora"] == trained["shira"] == trained["shira-gradient"] == lora
    assert trained["lamda"] == sum(32 * 32 + 32 * m.out_features for m in linears)
    # AdamW keeps two moments of each value and a 4-byte counter for each parameter.
    assert results["full"]["optimizer_bytes"] == 8 * trained["full"] + 4 * len(list(model.parameters()))
    assert results["shira"]["optimizer_bytes"] == 8 * lora + 4 * len(linears)
    # From step 3 on LaMDA trains S alone.
    s_bytes = len(linears) * (8 * 32 * 32 + 4)
    assert results["lamda"]["late_optimizer_bytes"] == s_bytes < results["lamda"]["optimizer_bytes"]
    assert results["lamda"]["late_profile"]["peak_bytes"] < results["lamda"]["peak_bytes"]
    for result in results.values():
        profile = result["profile"]
        assert (profile["peak_bytes"], profile["saved_bytes"]) == (result["peak_bytes"], result["kept_bytes"])


def test_adapters_keep_what_they_promise(job: tuple[dict[str, Any], str, Path]) -> None:
    results = by_variant(job[0])
    kept = {name: result["kept_bytes"] for name, result in results.items()}
    assert kept["shira"] == kept["shira-gradient"] < kept["lora"]
    assert kept["lamda"] < kept["lora"]
    disk = {name: result["disk_bytes"] for name, result in results.items()}
    assert disk["shira"] < disk["shira-gradient"] < disk["full"]  # a seed, gaps between places, everything


def test_table_words_and_switching_are_printed(job: tuple[dict[str, Any], str, Path]) -> None:
    report, printed, out = job
    lines = printed.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("variant "))
    assert [line.split()[0] for line in lines[start + 2 : start + 8]] == ["pretrained", *VARIANTS]
    lora = report["results"][1]
    assert f"{lora['new_losses'][-1][1]:.4f}" in lines[start + 4] and f"{lora['old_loss']:.4f}" in lines[start + 4]
    assert all(sentence in lines for sentence in report["in_words"])
    assert any(line.strip().startswith("base = model.unload()") for line in lines)
    assert str(out / "results.png") in lines[-1]


def test_a_loaded_adapter_has_the_loss_that_training_ended_with(job: tuple[dict[str, Any], str, Path]) -> None:
    report, results = job[0], by_variant(job[0])
    assert [switch["to"] for switch in report["switches"]] == ["shira-gradient", "shira"]
    for switch in report["switches"]:
        assert switch["new_loss"] == pytest.approx(results[switch["to"]]["new_losses"][-1][1], rel=1e-6)


def test_a_base_that_is_not_as_before_is_reported(
    job: tuple[dict[str, Any], str, Path], text_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = finetune_adapters.parse_options([*TOY, "--text", str(text_folder), "--out", str(job[2])])
    weights = {name: w.clone() for name, w in build_model("tiny", 32, 0).state_dict().items()}
    assert len(finetune_adapters.switch(options, weights, ["shira", "shira-gradient"])) == 2

    weights["model.norm.weight"][0] += 1
    monkeypatch.setattr(finetune_adapters, "pretrained_model", lambda *_: build_model("tiny", 32, 0))
    with pytest.raises(RuntimeError, match="^model.norm.weight is not what it was before the adapters were loaded"):
        finetune_adapters.switch(options, weights, ["shira"])


@pytest.mark.parametrize("name", ["shira", "shira-gradient"])
def test_shira_changes_no_weight_outside_of_its_mask(name: str, text_folder: Path, tmp_path: Path) -> None:
    options = finetune_adapters.parse_options([*TOY, "--text", str(text_folder), "--out", str(tmp_path)])
    weights = {name: w.clone() for name, w in build_model("tiny", 32, 0).state_dict().items()}
    run = finetune_adapters.Run(name, weights, options)
    for index, batch in enumerate(finetune_adapters.make_batches(options.new.train, 3, 2, 32, seed=0)):
        run.step(index, batch)
    changed_layers = 0
    for path, layer in run.model.get_base_model().named_modules():
        if not hasattr(layer, "memsave_shira_indices"):
            continue
        before, after = weights[f"{path}.weight"].flatten(), layer.get_base_layer().weight.detach().flatten()
        changed = (before != after).nonzero().flatten()
        mask = layer.memsave_shira_indices["default"].long()
        assert len(mask) == min(len(before), 16 * sum(layer.weight_shape))
        assert torch.isin(changed, mask).all()
        changed_layers += len(changed) > 0
    assert changed_layers == 14


def test_the_picture_shows_every_variant(job: tuple[dict[str, Any], str, Path]) -> None:
    picture = matplotlib.image.imread(job[2] / "results.png")  # (height, width, RGBA) in [0, 1]
    assert picture.shape[0] > 400 and picture.shape[1] > 1000
    pixels = (torch.from_numpy(picture)[..., :3] * 255).round().int()
    left = pixels[:, : pixels.shape[1] // 2]
    for name in VARIANTS[1:]:
        color = torch.tensor([int(adapter_figures.LINES[name][i : i + 2], 16) for i in (1, 3, 5)])
        assert (left == color).all(-1).sum() > 50, name


def test_some_variants_only(text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--text", str(text_folder), "--out", str(tmp_path), "--variants", "lamda", "full"]
    finetune_adapters.main([*TOY, *options])
    report = json.loads((tmp_path / "results.json").read_text())
    assert list(by_variant(report)) == ["lamda", "full"] and report["switches"] == []
    printed = capsys.readouterr().out
    assert "full against lamda" in printed and "set_adapter" not in printed
    assert {path.name for path in tmp_path.iterdir()} == {"full", "lamda", "results.json", "results.png"}


def test_settings_are_written_down(job: tuple[dict[str, Any], str, Path]) -> None:
    report = job[0]
    assert report["settings"]["steps"] == 10 and report["settings"]["pretrain_steps"] == 2
    assert set(report["versions"]) == {"python", "torch", "transformers", "peft"}
    assert report["text"]["new"]["files"] == 21 and report["text"]["old"]["training_bytes"] > 1_000_000
    rates = {result["variant"]: result["learning_rate"] for result in report["results"]}
    assert rates == finetune_adapters.RATES


def test_the_command_trains_on_what_is_installed(tmp_path: Path) -> None:
    command = [sys.executable, "examples/finetune_adapters.py", "--size", "tiny", "--steps", "3", "--batch", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = ["--pretrain-steps", "1", "--variants", "shira", "--out", str(tmp_path)]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fine-tuned on licenses and descriptions of installed packages" in done.stdout
    assert "bit for bit" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["text"]["new"]["training_bytes"] > 50_000


def paragraphs(data: torch.Tensor) -> list[bytes]:
    return [p for p in bytes(data.tolist()).split(b"\n\n") if p.strip()]


def test_installed_text_is_the_same_every_time_and_validation_shares_no_paragraph() -> None:
    text, again = package_text.read_package_text(), package_text.read_package_text()
    assert torch.equal(text.train, again.train) and torch.equal(text.validation, again.validation)
    train, validation = ({b" ".join(p.lower().split()) for p in paragraphs(d)} for d in (text.train, text.validation))
    assert len(train) > 100 and len(validation) > 10
    assert not train & validation
    assert len(text.train) <= package_text.TOTAL_BYTES


def test_which_files_are_read_and_which_of_their_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.dist-info" / "licenses").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.dist-info" / "METADATA").write_bytes(
        b"Name: a\r\nVersion: 1\r\n\r\nWhat a is.\r\n\r\nShared  words.\r\n"
    )
    (tmp_path / "a.dist-info" / "licenses" / "LICENSE").write_text("The license.\n \nshared\nWords.\n\nIts end.\n")
    (tmp_path / "a.dist-info" / "top_level.txt").write_text("a names\n")
    (tmp_path / "license.py").write_text("code = 1\n")
    (tmp_path / "b.txt").write_bytes(b"binary\0")
    (tmp_path / "tests" / "c.txt").write_text("of a test\n")
    (tmp_path / "d.rst").write_text("x" * 2 * package_text.DOCUMENT_BYTES)
    text = package_text.read_package_text(tmp_path)
    assert bytes(text.validation.tolist()) == b"What a is.\n\nShared  words."
    license_text, limited = bytes(text.train.tolist()).rsplit(b"\n", 1)
    assert license_text == b"The license.\n\nIts end."
    assert limited == b"x" * package_text.DOCUMENT_BYTES
    assert text.files == 3


def made_up(variant: str, new_loss: float, old_loss: float, megabytes: int, late_megabytes: int) -> Result:
    def profile(peak_bytes: int) -> MemoryProfile:
        timeline = Timeline(event=[0], phase=["forward"], live_bytes={})
        return MemoryProfile(
            peak_bytes=peak_bytes,
            baseline_bytes=0,
            saved_bytes=peak_bytes // 2,
            by_category={},
            by_module={},
            phase="backward",
            timeline=timeline,
        )

    size, late = megabytes * 2**20, late_megabytes * 2**20
    losses = [(0, 3.0), (5, new_loss)]
    sizes = (1000, size, size // 2, size // 4, late // 4, size // 8)
    return Result(variant, 0.001, losses, 2.0, old_loss, *sizes, megabytes / 100, profile(size), profile(late))


def test_words_and_table_follow_from_the_figures() -> None:
    results = [
        made_up("full", 2.5, 2.4, 100, 100),
        made_up("lora", 2.6, 2.2, 80, 80),
        made_up("lamda", 2.7, 2.1, 40, 20),
    ]
    sentences = in_words(results)
    assert sentences[0] == (
        "full against lora: 1.25x the peak, 1.25x the bytes kept for backward, 1.25x the optimizer's bytes, 1.25x the "
        "bytes on disk, 1.25x the step time; loss on the new text -0.1000, on the old +0.2000."
    )
    assert sentences[1].startswith("lamda against lora: 0.50x the peak")
    assert sentences[2] == (
        "Loss on the new kind of text, lowest first: full 2.5000, lora 2.6000, lamda 2.7000; before fine-tuning 3.0000."
    )
    assert sentences[3] == (
        "Loss on the old kind of text, lowest first: lamda 2.1000, lora 2.2000, full 2.4000; before fine-tuning 2.0000."
    )
    assert sentences[4].startswith("At the end of training lamda peaks at 20.0 MiB and its optimizer holds 5.0 MiB")
    assert len(sentences) == 6
    lines = table(results).splitlines()
    assert lines[2].split() == ["pretrained", "3.0000", "2.0000"]
    expected = "lamda 0.001 2.7000 2.1000 1,000 40.0 MiB 20.0 MiB 10.0 MiB 5.0 MiB 400 ms"
    assert lines[5].split() == expected.split()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "dora"], "argument --variants: invalid choice: 'dora'"),
        (["--variants", "lora", "lora"], "argument --variants: each may be given once, got lora lora"),
        (["--steps", "2"], "argument --steps: expected a whole number of at least 3, got '2'"),
        (["--pretrain-steps", "0"], "argument --pretrain-steps: expected a whole number of at least 1, got '0'"),
        (["--size", "medium"], "argument --size: invalid choice: 'medium'"),
        (["--seed", "-1"], "argument --seed: expected"),
        (["--text", "no/such/folder"], "argument --text: no/such/folder is not a folder"),
        (["--length", "100000"], "argument --text: the text has"),
    ],
)
def test_wrong_options_say_what_was_expected(
    options: list[str], message: str, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        finetune_adapters.main(["--text", str(text_folder), "--out", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "text", files=3, lines=2)
    with pytest.raises(SystemExit):
        finetune_adapters.main(["--text", str(tmp_path / "text"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert "holds 3 files with" in error and "at least 2 with 16384 are needed" in error


def test_an_output_that_is_no_folder_is_refused(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit):
        finetune_adapters.main(["--text", str(text_folder), "--out", str(tmp_path / "taken")])
    assert "argument --out:" in capsys.readouterr().err


def test_the_page_shows_a_committed_run() -> None:
    """Its table and its sentences are those of benchmarks/results/cpu/adapters_example.json, a `make adapters`."""
    run = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "adapters_example.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    results = [SimpleNamespace(**result, new_loss=result["new_losses"][-1][1]) for result in run["results"]]
    assert table(results) in page  # type: ignore[arg-type]
    words = " ".join(page.split())
    assert [sentence for sentence in run["in_words"] if sentence not in words] == []
    assert {result["variant"]: result["learning_rate"] for result in run["results"]} == finetune_adapters.RATES
