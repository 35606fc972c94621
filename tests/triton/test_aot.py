"""Compiles every kernel ahead of time for three GPUs that need not be there, and bounds what each would take of one.

No registers may spill to memory, and the shared memory must fit into one block of the smallest GPU of each family. That
a kernel compiles says nothing about its results: see `interpreted/` and `test_gpu.py`.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the triton package is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: this process cannot compile kernels", allow_module_level=True)

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

KIB = 1024
# sm_80 has 163 KiB, but sm_86 and sm_89 run the same code with 99.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


def kernels_of(op: str) -> Any:
    return import_module(f"memsave.ops.{op}.triton")


@dataclass
class Build:
    """One kernel as the JIT would specialize it.

    Attributes:
        types: Triton type of each argument; pointers, and the names in `multiples`, are multiples of 16.
        constants: compile-time values, also the strides of 1.
        options: number of warps and stages.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)

    def compile(self, target: GPUTarget) -> Any:
        names = self.kernel.arg_names
        aligned = [n for n in names if self.types.get(n, "").startswith("*") or n in self.multiples]
        source = ASTSource(
            fn=self.kernel,
            signature={name: self.types.get(name, "constexpr") for name in names},
            constexprs=self.constants,
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        return triton.compile(source, target=target, options=self.options)


def integer_builds() -> list[Build]:
    draw, inclusion = kernels_of("draw_rows"), kernels_of("row_inclusion")
    block = {"BLOCK": draw.BLOCK}
    counts = {"N": "i32", "K": "i32"}
    pointers = dict.fromkeys(("q_permuted", "ends", "permutation", "seed"), "*i64")
    sorted_sums = dict.fromkeys(("quantized", "ordered", "sums", "room"), "*i64")
    filled = dict.fromkeys(("room", "filled", "q"), "*i64")
    builds = [
        Build("key", draw.key_kernel, {"keys": "*i64", "seed": "*i64", "N": "i32"}, block),
        Build("hit", draw.hit_kernel, {**pointers, "hits": "*i32", **counts}, block),
        Build("room", inclusion.room_kernel, {**sorted_sums, **counts}, block),
        Build("fill", inclusion.fill_kernel, {**filled, **counts}, block),
    ]
    for dtype in ("fp16", "bf16", "fp32", "fp64"):
        types = {"weights": f"*{dtype}", "peak": f"*{dtype}", "quantized": "*i64", "N": "i32"}
        builds.append(Build(f"quantize_{dtype}", inclusion.quantize_kernel, types, {**block, "stride": 1}))
    return builds


def gather_builds() -> list[Build]:
    """Every dtype with a scale, and the narrowest, a middle and the widest tile."""
    gather = kernels_of("gather_rows")
    rows_of = [("fp16", 4096, True), ("bf16", 4096, True), ("fp32", 4096, True), ("fp64", 1, True)]
    rows_of += [("bf16", 64, False), ("fp64", 4096, False)]
    builds = []
    for dtype, features, scaled in rows_of:
        block_k, block_d = gather.tile(features)
        types = {"x": f"*{dtype}", "rows": "*i32", "out": f"*{dtype}", "K": "i32", "D": "i32", "stride_n": "i32"}
        constants = {"stride_d": 1, "stride_row": 1, "HAS_SCALE": scaled, "BLOCK_K": block_k, "BLOCK_D": block_d}
        if scaled:
            types["scale"] = "*fp32"
            constants["stride_scale"] = 1
        else:
            types["stride_scale"] = "i32"
            constants["scale"] = None
        name = f"gather_{dtype}_{features}{'_scaled' if scaled else ''}"
        multiples = ("D", "stride_n") if features > 1 else ()
        builds.append(Build(name, gather.gather_kernel, types, constants, multiples))
    return builds


def matmul_builds() -> list[Build]:
    """Every tile that autotuning may pick, for every dtype; the result in that dtype, or in fp32 as partial sums."""
    matmul = kernels_of("sampled_matmul")
    sizes = ("K", "OUT", "IN", "slice_rows", "shape_class")
    strides = ("stride_dy_n", "stride_kept_k")
    ones = dict.fromkeys(("stride_dy_o", "stride_kept_d", "stride_rows", "stride_scale"), 1)
    builds = []
    for dtype, size, precision in [("fp16", 2, "ieee"), ("bf16", 2, "ieee"), ("fp32", 4, "ieee"), ("fp32", 4, "tf32")]:
        for config in matmul.CONFIGS[size]:
            tile = "x".join(str(value) for value in config.kwargs.values())
            types = {"dy": f"*{dtype}", "kept": f"*{dtype}", "rows": "*i32", "scale": "*fp32"}
            types["out"] = "*fp32" if dtype == "bf16" else f"*{dtype}"
            types |= dict.fromkeys((*sizes, *strides), "i32")
            constants = {**ones, "PRECISION": precision, **config.kwargs}
            options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
            multiples = ("K", "OUT", "IN", *strides)
            name = f"matmul_{dtype}_{precision}_{tile}"
            builds.append(Build(name, matmul.matmul_kernel, types, constants, multiples, options))
    return builds


BUILDS = [*integer_builds(), *gather_builds(), *matmul_builds()]


def spilled(compiled: Any, target: GPUTarget, directory: Path) -> dict[str, int]:
    """What the compiler moved from registers to memory: bytes of stack and local memory, or numbers of registers."""
    if target.backend == "cuda":
        cubin = directory / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        found = re.findall(r"\b(STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)
        expected = {"STACK", "LOCAL"}
    else:
        pattern = r"\.((?:sgpr|vgpr)_spill_count|private_segment_fixed_size):\s+(\d+)"
        found = re.findall(pattern, compiled.asm["amdgcn"])
        expected = {"sgpr_spill_count", "vgpr_spill_count", "private_segment_fixed_size"}
    assert {name for name, _ in found} == expected, f"the resource usage was not found: {found}"
    return {name: int(value) for name, value in found if int(value)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_fits_the_gpu(build: Build, target: str, tmp_path: Path) -> None:
    gpu, shared_bytes = TARGETS[target]
    compiled = build.compile(gpu)
    assert spilled(compiled, gpu, tmp_path) == {}
    assert compiled.metadata.shared <= shared_bytes


@pytest.mark.parametrize("target", TARGETS)
def test_resources_are_seen(target: str, tmp_path: Path) -> None:
    """A test of the test: one warp cannot hold a tile of 128 x 128, and its operands take shared memory."""
    gpu, _ = TARGETS[target]
    sound = next(build for build in matmul_builds() if "bf16" in build.name)
    block_k = 32 if gpu.backend == "hip" else 16
    constants = {**sound.constants, "BLOCK_O": 128, "BLOCK_D": 128, "BLOCK_K": block_k}
    options = {"num_warps": 1, "num_stages": 2}
    compiled = Build("large", sound.kernel, sound.types, constants, sound.multiples, options).compile(gpu)
    assert spilled(compiled, gpu, tmp_path)
    assert compiled.metadata.shared >= 128 * block_k * 2
