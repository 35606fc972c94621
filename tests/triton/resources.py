"""Compiles a kernel for a GPU that need not be there, and says what it would take of one beyond what there is."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KIB = 1024
# The shared memory of one block. sm_80 has 163 KiB, but sm_86 and sm_89 run the same code with 99.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 99 * KIB),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * KIB),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * KIB),
}


@dataclass
class Build:
    """One kernel as the JIT would specialize it.

    Attributes:
        types: Triton type of each argument; pointers, and the names in `multiples`, are multiples of 16.
        constants: compile-time values, also the strides of 1.
        options: number of warps and stages.
        targets: for which GPUs.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(TARGETS)

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


def excess(build: Build, target: str, directory: Path) -> list[str]:
    """In words: registers that spill to memory, and more shared memory than a block has. Empty for a sound kernel."""
    gpu, shared_bytes = TARGETS[target]
    compiled = build.compile(gpu)
    found = [f"spills: {name} {value}" for name, value in spilled(compiled, gpu, directory).items()]
    if compiled.metadata.shared > shared_bytes:
        found.append(f"{compiled.metadata.shared} bytes of shared memory, of {shared_bytes}")
    return found
