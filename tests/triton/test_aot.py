"""Compiles every kernel ahead of time for three GPUs that need not be there, and bounds what each would take of one.

No registers may spill to memory, and the shared memory must fit into one block of the smallest GPU of each family. That
a kernel compiles says nothing about its results: see `interpreted/` and `test_gpu.py`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: this process cannot compile kernels", allow_module_level=True)

import memsave  # noqa: E402

from .builds import BUILDS  # noqa: E402
from .jit_functions import functions_of, names_in, reached_from  # noqa: E402
from .resources import TARGETS, Build, excess  # noqa: E402

PACKAGE = Path(memsave.__file__).parent


@pytest.mark.parametrize(
    ("build", "target"),
    [pytest.param(build, target, id=f"{build.name}-{target}") for build in BUILDS for target in build.targets],
)
def test_fits_the_gpu(build: Build, target: str, tmp_path: Path) -> None:
    assert excess(build, target, tmp_path) == []


def large(block_k: int, warps: int, stages: int) -> Build:
    """A product with tiles of 128 x 128."""
    sound = next(build for build in BUILDS if build.name.startswith("matmul_bf16"))
    constants = {**sound.constants, "BLOCK_O": 128, "BLOCK_D": 128, "BLOCK_K": block_k}
    return replace(sound, name="large", constants=constants, options={"num_warps": warps, "num_stages": stages})


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_seen(target: str, tmp_path: Path) -> None:
    """A test of the test: one warp cannot hold a tile of 128 x 128."""
    block_k = 32 if target == "gfx942" else 16
    assert any(line.startswith("spills: ") for line in excess(large(block_k, 1, 2), target, tmp_path))


@pytest.mark.parametrize("target, block_k, stages", [("sm_80", 128, 7), ("sm_90", 128, 9), ("gfx942", 256, 3)])
def test_too_much_shared_memory_is_seen(target: str, block_k: int, stages: int, tmp_path: Path) -> None:
    """A test of the test: the operands of several steps of the product wait in shared memory."""
    assert any("bytes of shared memory, of" in line for line in excess(large(block_k, 8, stages), target, tmp_path))


def test_every_triton_function_is_compiled() -> None:
    assert functions_of(PACKAGE) == reached_from(build.kernel for build in BUILDS)


def test_a_kernel_without_a_build_is_missed() -> None:
    """A test of the test, with a kernel and with one that calls others."""
    rest = [build for build in BUILDS if not build.name.startswith(("gather", "room"))]
    missed = functions_of(PACKAGE) - reached_from(build.kernel for build in rest)
    inclusion = {f"row_inclusion.triton.{name}" for name in ("room_kernel", "count_capped", "is_capped")}
    assert missed == {f"memsave.ops.{name}" for name in {"gather_rows.triton.gather_kernel"} | inclusion}


@pytest.mark.parametrize(
    "source",
    [
        "@triton.jit\ndef kernel(): pass",
        "@triton.jit(do_not_specialize=['n'])\ndef kernel(): pass",
        "from triton import jit\n@jit\ndef kernel(): pass",
        "@triton.autotune(configs, key=[])\n@triton.jit\ndef kernel(): pass",
        "def make():\n    @triton.jit\n    def kernel(): pass\n    return kernel",
        "class Kernels:\n    @triton.jit\n    def kernel(): pass",
    ],
)
def test_each_way_to_decorate_is_found(source: str) -> None:
    assert names_in(source) == ["kernel"]


@pytest.mark.parametrize(
    "source",
    [
        "kernel = triton.jit(function)",
        "decorate = triton.jit\n@decorate\ndef kernel(): pass",
        "from triton import jit as compiled\n@compiled\ndef kernel(): pass",
        "kernel = triton.runtime.JITFunction(function)",
    ],
)
def test_a_way_that_is_not_followed_is_an_error(source: str) -> None:
    with pytest.raises(ValueError, match="line 1: jit"):
        names_in(source)
