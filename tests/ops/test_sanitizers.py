"""The C++ kernels, compiled with sanitizers, over the case table: of addresses, undefined behaviour and threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from memsave import ops
from tests.harness import has_kernel

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
PARALLEL_FOR = ROOT / "tests" / "ops" / "parallel_for.cpp"
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


# Races that only the thread sanitizer sees: op, source, what is right, what is wrong.
RACES = {
    # Between the threads of one call: all pieces use the scratch memory of the first.
    "pq_select": ("job.scratch + piece * job.keys;", "job.scratch;"),
    # Between calls: they share what is on the stack of each.
    "selected_attention": ("Wide query[kMaxHead], products", "static Wide query[kMaxHead], products"),
}
SANITIZERS = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
RUNTIMES = {
    name: [runtime_of(COMPILER, library) for library in (runtime, "libstdc++.so")] if COMPILER else [None]
    for name, runtime in SANITIZERS.items()
}
ROUNDS = os.environ.get("MEMSAVE_FUZZ", "1")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(None in paths for paths in RUNTIMES.values()) or not CSRC.exists(),
        reason="needs g++ with libasan and libtsan on Linux, and csrc/",
    ),
]


def build(csrc: Path, library: Path, *options: str, sanitizer: str = "address,undefined") -> Path:
    assert COMPILER is not None
    flags = [
        "-std=c++17",
        "-g",
        "-ffp-contract=off",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-pthread",
    ]
    sources = [str(path) for path in (*sorted(csrc.glob("*.cpp")), PARALLEL_FOR)]
    subprocess.run([COMPILER, *flags, *options, "-shared", "-fPIC", *sources, "-o", str(library)], check=True)
    return library


def environment(sanitizer: str) -> dict[str, str]:
    """What a process needs that loads a library with a sanitizer."""
    return {
        "LD_PRELOAD": " ".join(path for path in RUNTIMES[sanitizer] if path),
        "ASAN_OPTIONS": "detect_leaks=0",  # torch and Python leave memory to the end of the process
        # Of torch and Python, which are not compiled with it, the thread sanitizer sees only a part.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
        "PYTHONPATH": str(ROOT),
    }


def run(
    library: Path, *args: str, module: str = "sanitized", sanitizer: str = "address,undefined"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.ops.{module}", str(library), *args]
    variables = os.environ | environment(sanitizer)
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)


def with_mistakes(folder: Path, mistakes: Iterable[tuple[str, str, str]]) -> Path:
    """A copy of csrc/ with (op, what is right, what is wrong) changed."""
    copy = Path(shutil.copytree(CSRC, folder / "csrc"))
    for op, right, wrong in mistakes:
        source = copy / f"{op}.cpp"
        text = source.read_text()
        assert text.count(right) == 1, f"{source.name} no longer contains {right!r} once: update this mistake"
        source.write_text(text.replace(right, wrong))
    return copy


def kernels() -> list[str]:
    return [op for op in ops.backends() if has_kernel(op, "native")]


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(CSRC, tmp_path_factory.mktemp("clean") / "clean.so", "-O1")


def test_kernels_are_clean(clean: Path) -> None:
    done = run(clean)
    assert done.stdout.split() == kernels(), done.stderr[-3000:]


def test_kernels_are_clean_in_several_threads(clean: Path) -> None:
    done = run(clean, ROUNDS, module="threaded")
    assert done.stdout.split() == kernels(), done.stderr[-3000:]


def test_threads_do_not_race(tmp_path: Path) -> None:
    # No clones: what chooses between them would run before the sanitizer is ready.
    library = build(CSRC, tmp_path / "threads.so", "-O1", "-DMS_NO_CLONES", sanitizer="thread")
    done = run(library, ROUNDS, module="threaded", sanitizer="thread")
    assert done.stdout.split() == kernels(), done.stderr[-3000:]


@pytest.fixture(scope="module")
def racing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with every race."""
    folder = tmp_path_factory.mktemp("racing")
    copy = with_mistakes(folder, ((op, *change) for op, change in RACES.items()))
    return build(copy, folder / "racing.so", "-O0", "-DMS_NO_CLONES", sanitizer="thread")


@pytest.mark.parametrize("op", RACES)
def test_a_race_is_noticed(op: str, racing: Path) -> None:
    """A test of the test."""
    done = run(racing, "1", op, module="threaded", sanitizer="thread")
    assert done.returncode != 0 and done.stdout == ""
    assert "ThreadSanitizer: data race" in done.stderr and f"{op}.cpp" in done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with every mistake, each in a kernel of its own."""
    folder = tmp_path_factory.mktemp("broken")
    copy = with_mistakes(folder, ((op, right, wrong) for op, (right, wrong, _) in MISTAKES.items()))
    return build(copy, folder / "broken.so", "-O0", "-DMS_NO_CLONES")


def test_a_mistake_is_noticed_in_several_threads(broken: Path) -> None:
    done = run(broken, "1", "gather_rows", module="threaded")
    assert done.returncode != 0 and done.stdout == ""
    assert MISTAKES["gather_rows"][2] in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("op", MISTAKES)
def test_a_mistake_is_noticed(op: str, broken: Path) -> None:
    """A test of the test: each fault ends the process, with the sanitizer's words."""
    done = run(broken, op)
    assert done.returncode != 0 and done.stdout == ""
    assert MISTAKES[op][2] in done.stderr, done.stderr[-3000:]


def test_every_kernel_has_a_mistake() -> None:
    sources = {path.stem for path in CSRC.glob("*.cpp")} - {"common"}
    assert set(MISTAKES) == sources
