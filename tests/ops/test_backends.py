"""Which backend serves an op, how to ask for one, and what happens when it is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import memsave
from memsave import ops
from memsave.ops import _backend, _native
from tests.cases.ops.inputs import inclusion, matrix, row_indices, scales, seed

ROOT = Path(memsave.__file__).parent.parent


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after an installation without a compiler."""
    monkeypatch.setattr(_native, "LIBRARY_PATH", Path("/nowhere") / _native.LIBRARY_NAME)
    _native._load.cache_clear()
    _backend._set(None)
    yield
    monkeypatch.undo()
    _native._load.cache_clear()
    _backend._set(None)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=ROOT, capture_output=True, text=True
    )


def test_report_names_an_active_backend_and_a_reason_for_each_other() -> None:
    report = json.loads(json.dumps(ops.backends()))
    assert set(report) == {
        "draw_rows", "draw_winners", "gather_rows", "new_seed", "rms_norm", "rms_norm_backward",
        "row_inclusion", "sampled_matmul",
    }  # fmt: skip
    for devices in report.values():
        assert set(devices) == {"cpu", "cuda"}
        for entry in devices.values():
            assert set(entry["why_not"]) == set(_backend.BACKENDS) - {entry["active"]}
            assert all(entry["why_not"].values())
    expected = "native" if _native.library() is not None else "reference"
    assert report["gather_rows"]["cpu"]["active"] == expected
    assert report["draw_winners"]["cpu"] == {
        "active": "reference",
        "why_not": dict.fromkeys(("native", "triton"), "this op has no such kernel"),
    }


def test_without_the_library_plain_pytorch_serves_and_the_report_says_why(without_native: None) -> None:
    entry = ops.backends()["row_inclusion"]["cpu"]
    assert entry["active"] == "reference" and "was not built" in entry["why_not"]["native"]
    assert int(ops.row_inclusion(torch.ones(4), 1).sum()) == 2**32
    with pytest.raises(ops.BackendError, match="'native' was asked for, but _libmemsave.* was not built"):
        ops.use_backend("native").__enter__()


def test_a_library_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if _native.library() is None:
        pytest.skip(f"no C++ kernels: {_native.state()}")
    monkeypatch.setattr(_native, "ABI_VERSION", _native.ABI_VERSION + 1)
    library, state = _native._load.__wrapped__()
    assert library is None and "install memsave again" in state


def test_a_file_that_is_no_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / _native.LIBRARY_NAME
    broken.write_text("not a library")
    monkeypatch.setattr(_native, "LIBRARY_PATH", broken)
    library, state = _native._load.__wrapped__()
    assert library is None and "does not load" in state


def test_use_reference_switches_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from memsave.ops.gather_rows import reference

    calls: list[int] = []
    original = reference.gather_rows

    def counted(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(reference, "gather_rows", counted)
    _backend._set(None)
    args = matrix(6, 4), row_indices(6, 2), scales(2)
    with ops.use_reference():
        ops.gather_rows(*args)
        assert ops.backends()["gather_rows"]["cpu"] == {
            "active": "reference",
            "why_not": {
                "native": _backend.missing("native") or "reference was asked for",
                "triton": "it serves cuda tensors, not cpu",
            },
        }
    assert calls == [1]
    ops.gather_rows(*args)
    assert len(calls) == (1 if _native.library() is not None else 2)
    _backend._set(None)  # forget the patched function


def test_the_block_ends_also_after_an_error() -> None:
    with pytest.raises(KeyError), ops.use_reference():
        raise KeyError
    assert _backend.wish() == (os.environ.get("MEMSAVE_BACKEND") or None)


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(ValueError, match="'cuda': expected one of reference, native, triton"):
        ops.use_backend("cuda").__enter__()


def test_a_wrong_name_in_the_environment_is_an_error_at_first_use() -> None:
    _backend._set("fast")
    try:
        with pytest.raises(ops.BackendError, match="MEMSAVE_BACKEND='fast': expected one of reference"):
            ops.row_inclusion(torch.ones(3), 1)
        assert ops.backends()["row_inclusion"]["cpu"]["active"] is None
    finally:
        _backend._set(None)


def test_triton_asked_for_without_a_gpu_is_an_error_in_words() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ops.BackendError, match="'triton' was asked for, but .*(not installed|no CUDA)"):
        ops.use_backend("triton").__enter__()


def test_the_environment_forces_a_backend_or_an_error_at_first_use() -> None:
    code = """
import torch, memsave.ops as ops
print(ops.new_seed(torch.ones(1)).shape)  # no such kernel exists: plain PyTorch
try:
    ops.row_inclusion(torch.ones(3), 1)
except ops.BackendError as error:
    print(error)
"""
    done = run_python(code, MEMSAVE_BACKEND="triton")
    assert done.stdout.splitlines() == [
        "torch.Size([])",
        "memsave::row_inclusion: backend 'triton' was asked for (MEMSAVE_BACKEND or use_backend), "
        "but it serves cuda tensors, not cpu.",
    ], done.stderr


def test_import_loads_no_backend_and_ops_run_where_triton_cannot_be_imported() -> None:
    code = """
import sys
import torch, memsave.ops as ops
from memsave.ops import _native
print("triton" in sys.modules, _native._load.cache_info().currsize)
sys.modules["triton"] = None
print(ops.row_inclusion(torch.ones(4), 1).sum().item())
print(_native._load.cache_info().currsize, ops._backend.missing("triton"))
"""
    done = run_python(code)
    assert done.stdout.splitlines() == ["False 0", str(2**32), "1 the triton package is not installed"], done.stderr


@pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")
def test_threads_come_from_torch() -> None:
    assert _native.state() == f"loaded {_native.LIBRARY_NAME}, threads of torch"


def test_two_threads_draw_at_the_same_time() -> None:
    from concurrent.futures import ThreadPoolExecutor

    q = inclusion(3000, 900)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda value: ops.draw_rows(q, 900, seed(value)).tolist(), [5, 6] * 10))
    assert drawn == [drawn[0], drawn[1]] * 10 and drawn[0] != drawn[1]
