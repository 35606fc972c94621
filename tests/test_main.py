"""`python -m memsave`: the report says what is true of this process, as text and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import memsave
from memsave import __main__ as command
from memsave import environment
from memsave.ops import _native


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memsave", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_json_tells_the_state_of_this_machine() -> None:
    report = json.loads(run("--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["memsave"] == memsave.__version__
    assert report["native"] == {"loaded": _native.library() is not None, "state": _native.state()}
    assert report["backends"] == memsave.backends()
    assert report["cpu"]["cores"] == os.cpu_count()
    assert len(report["devices"]) == torch.accelerator.device_count()


def test_json_follows_a_backend_asked_for() -> None:
    report = json.loads(run("--json", MEMSAVE_BACKEND="reference").stdout)
    on_cpu = {op: devices["cpu"] for op, devices in report["backends"].items()}
    assert {state["active"] for state in on_cpu.values()} == {"reference"}
    assert all(set(state["why_not"]) == {"native", "triton"} for state in on_cpu.values())


def test_text_has_a_line_for_every_package_and_op(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines if line]
    assert ["torch", torch.__version__] in words
    for op, devices in memsave.backends().items():
        assert [op, devices["cpu"]["active"] or "none", devices["cuda"]["active"] or "none"] in words


def test_text_names_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package"))
    command.main([])
    assert ["no-such-package", "not", "installed"] in map(str.split, capsys.readouterr().out.splitlines())


def test_reasons_are_grouped_by_what_they_say() -> None:
    def state(active: str | None, **why_not: str) -> dict[str, object]:
        return {"active": active, "why_not": why_not}

    backends = {
        "gather": {"cpu": state("native", triton="no device"), "cuda": state(None, native="none", triton="none")},
        "draw": {"cpu": state("reference", triton="no kernel"), "cuda": state(None, native="none", triton="none")},
    }
    header, *lines = (line.split() for line in environment._why_not_lines(backends))
    assert header == ["not", "on", "backend", "why", "(ops)"]
    assert lines == [
        ["cpu", "triton", "no", "device", "(gather)"],
        ["cpu", "triton", "no", "kernel", "(draw)"],
        ["cuda", "native,", "triton", "none", "(all", "ops)"],
    ]


def test_devices_are_named_with_their_memory() -> None:
    assert environment._device_text({"device": "mps:0"}) == "mps:0"
    described = environment._device_text({"device": "cuda:1", "name": "Some GPU", "memory_bytes": 3 * 2**29})
    assert described == "cuda:1 Some GPU (1.5 GiB)"


def test_an_unknown_option_is_refused_with_the_usage() -> None:
    done = run("--yaml")
    assert done.returncode == 2
    assert "usage: python -m memsave" in done.stderr and "--yaml" in done.stderr
