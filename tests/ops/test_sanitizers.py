"""The C++ kernels, compiled with the address and undefined-behaviour sanitizers, over the case table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from memsave import ops
from tests.harness import has_kernel

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
# One mistake in each kernel: op, source, what is right, what is wrong, and what the sanitizer says.
MISTAKES = {
    "activation": ("job.pieces.size(piece);", "kBlock;", "heap-buffer-overflow"),
    "activation_backward": ("j < n; ++j", "j <= n; ++j", "heap-buffer-overflow"),
    "gated_activation": (
        "job.pieces.read(job.up, piece,",
        "job.pieces.read(job.up, piece + 1,",
        "heap-buffer-overflow",
    ),
    "gated_activation_backward": ("job.pieces.size(piece);", "kBlock;", "heap-buffer-overflow"),
    "gather_rows": ("r < end; ++r", "r <= end; ++r", "heap-buffer-overflow"),
    "sddmm": ("std::min(job.a.columns, first + kRows);", "first + kRows;", "heap-buffer-overflow"),
    "spmm": ("t < tile.tokens; ++t", "t <= tile.tokens; ++t", "heap-buffer-overflow"),
    "draw_rows": ("row < n && found < k", "row < n", "heap-buffer-overflow"),
    "row_inclusion": (
        "1 + static_cast<int32_t>(share)",
        "(1 << 30) + 1 + int32_t(share)",
        "signed integer",
    ),
    "logit_statistics": ("parallel_for(n_rows, grain", "parallel_for(n_rows + 1, grain", "heap-buffer-overflow"),
    "logit_statistics_backward": ("n = std::min(kBlock, job.columns - start)", "n = kBlock", "heap-buffer-overflow"),
    "rms_norm": ("parallel_for(n_rows, grain", "parallel_for(n_rows + 1, grain", "heap-buffer-overflow"),
    "rms_norm_backward": ("columns, 1, element_bytes", "columns - 1, 1, element_bytes", "heap-buffer-overflow"),
    "layer_norm_backward": ("columns, 2, 4)", "columns, 1, 4)", "heap-buffer-overflow"),
    "pack_bits": ("source + 8 * whole, source + columns", "source + 8 * whole, source + columns + 1", "overflow"),
    "masked_scale": ("j + 32 <= n", "j < n", "buffer-overflow"),
    "pq_encode": ("std::min(kKeys, job.keys - first)", "kKeys", "heap-buffer-overflow"),
    "pq_table": ("batch * heads * rows, std::max", "batch * heads * rows + 1, std::max", "heap-buffer-overflow"),
    "pq_select": ("out + job.keep, -1)", "out + job.keep + 1, -1)", "heap-buffer-overflow"),
    "pq_select_blocks": ("out + job.keep, -1)", "out + job.keep + 1, -1)", "heap-buffer-overflow"),
    "selected_attention": ("c < width; ++c", "c <= width; ++c", "heap-buffer-overflow"),
    "selected_attention_backward": (
        "c < job.features; ++c) narrow_to",
        "c <= job.features; ++c) narrow_to",
        "heap-buffer-overflow",
    ),
}


def runtime_of(compiler: str, name: str) -> str | None:
    """The path of a runtime library of the compiler, or None."""
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


RUNTIMES = [runtime_of(COMPILER, name) for name in ("libasan.so", "libstdc++.so")] if COMPILER else [None]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(None in RUNTIMES or not CSRC.exists(), reason="needs g++ with libasan on Linux, and csrc/"),
]


def build(csrc: Path, library: Path, *options: str) -> Path:
    assert COMPILER is not None
    flags = ["-std=c++17", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [str(path) for path in sorted(csrc.glob("*.cpp"))]
    subprocess.run([COMPILER, *flags, *options, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
    return library


def run(library: Path, *ops: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": " ".join(path for path in RUNTIMES if path),
        "ASAN_OPTIONS": "detect_leaks=0",  # torch and Python leave memory to the end of the process
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.sanitized", str(library), *ops]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_kernels_are_clean(tmp_path: Path) -> None:
    done = run(build(CSRC, tmp_path / "sanitized.so", "-O1"))
    assert done.stdout.split() == [op for op in ops.backends() if has_kernel(op, "native")], done.stderr[-3000:]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with every mistake, each in a kernel of its own."""
    folder = tmp_path_factory.mktemp("broken")
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    for op, (right, wrong, _) in MISTAKES.items():
        source = copy / f"{op}.cpp"
        text = source.read_text()
        assert text.count(right) == 1, f"{source.name} no longer contains {right!r} once: update this mistake"
        source.write_text(text.replace(right, wrong))
    return build(copy, folder / "broken.so", "-O0", "-DMS_NO_CLONES")


@pytest.mark.parametrize("op", MISTAKES)
def test_a_mistake_is_noticed(op: str, broken: Path) -> None:
    """A test of the test: each fault ends the process, with the sanitizer's words."""
    done = run(broken, op)
    assert done.returncode != 0 and done.stdout == ""
    assert MISTAKES[op][2] in done.stderr, done.stderr[-3000:]


def test_every_kernel_has_a_mistake() -> None:
    sources = {path.stem for path in CSRC.glob("*.cpp")} - {"common"}
    assert set(MISTAKES) == sources
