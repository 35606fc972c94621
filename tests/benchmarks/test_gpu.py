"""`make gpu` as far as a CPU can run it: every part at toy size, and what it refuses to start with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).parents[2]

TILES = ["tiles_sampled_matmul", "tiles_low_rank_mlp", "tiles_gather_rows", "tiles_sddmm"]


def dry_run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--out", str(out), *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_all_parts_of_a_dry_run(tmp_path: Path) -> None:
    done = dry_run(tmp_path / "out", "--case", "op_new_seed", "op_row_inclusion")
    assert done.returncode == 0, done.stdout + done.stderr
    files = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"tests.log", "results.json", "tune.json"} == {str(path) for path in files}
    assert len(files) <= 8 and max(len(path.parts) for path in files) <= 3
    assert "skipped" in (tmp_path / "out" / "tests.log").read_text().splitlines()[-1]
    results, tune = (json.loads((tmp_path / "out" / name).read_text()) for name in ("results.json", "tune.json"))
    assert list(results["results"]) == ["op_new_seed", "op_row_inclusion"]
    assert list(tune["results"]) == TILES
    assert results["tiny"] and all(data["tiny"] for data in tune["results"].values())
    assert "All passed." in done.stdout


def test_a_spent_budget_leaves_everything_out_and_says_so(tmp_path: Path) -> None:
    done = dry_run(tmp_path / "out", "--part", "tune", "--budget-s", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = json.loads((tmp_path / "out" / "tune.json").read_text())["left_out"]
    assert list(left_out) == TILES
    assert "LEFT OUT: tiles_gather_rows: 0 s of the time budget were left" in done.stdout


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"was run: {args}")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "{}/full", "--device", "cpu"], "full is not empty; name a new folder or empty it. Nothing was run."),
        (["--out", "{}/full/file", "--device", "cpu"], "file is not a folder. Nothing was run."),
        (["--out", "", "--device", "cpu"], "no folder was named; expected make gpu OUT=DIR. Nothing was run."),
        (["--device", "cpu"], "the following arguments are required: --out"),
        (["--out", "{}/new", "--wheels", "{}/full"], "there are no wheels (*.whl) in"),
        (["--out", "{}/new"], "torch sees no CUDA or ROCm device. Nothing was run. For a dry run: DEVICE=cpu"),
        (["--out", "{}/new", "--part", "all of it"], "invalid choice: 'all of it'"),
    ],
)
def test_what_it_refuses(
    options: list[str], message: str, tmp_path: Path, nothing_runs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SystemExit) as caught:
        gpu.main([option.format(tmp_path) for option in [*options, "--install"]])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_it_installs_offline_the_checkout_first_and_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def record(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "peer.whl").touch()
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu", "--part", "bench"]
    assert gpu.main([*arguments, "--install", "--wheels", str(tmp_path / "wheels")]) == 0
    checkout, peer, bench = commands
    assert {"--no-build-isolation", "--no-deps", "--no-index", "--editable", str(ROOT)} <= set(checkout)
    assert {"--no-deps", "--no-index", str(tmp_path / "wheels" / "peer.whl")} <= set(peer)
    assert "benchmarks.run" in bench
    commands.clear()
    assert gpu.main(arguments) == 0
    assert len(commands) == 1


@pytest.mark.parametrize("fails", ["install", "tests", "killed"])
def test_what_fails_is_told(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def run(command: list[str], timeout: float | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        part = next(name for name in ("pip", "pytest", "benchmarks.run") if name in command)
        ran.append(part)
        if fails == "killed" and part == "pytest":
            raise subprocess.TimeoutExpired(command, timeout or 0.0)
        failed = (fails, part) in (("install", "pip"), ("tests", "pytest"))
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(subprocess, "run", run)
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--install"]) == 1
    printed = capsys.readouterr()
    if fails == "install":
        assert ran == ["pip"] and "this failed" in printed.err
    else:  # the other parts run all the same
        assert ran[-3:] == ["pytest", "benchmarks.run", "benchmarks.run"] and "FAILED: tests\n" in printed.out
    assert ("tests: killed after" in printed.err) == (fails == "killed")


def test_no_part_outlasts_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all at most nine minutes, even where everything has to be killed."""
    now = [0.0]

    def run(command: list[str], timeout: float | None = None, **_: Any) -> subprocess.CompletedProcess[str]:
        if timeout is None:
            now[0] += 60.0  # the installation
            return subprocess.CompletedProcess(command, 0)
        now[0] += timeout
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert gpu.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--install"]) == 1
    assert 500 <= now[0] <= 9 * 60
