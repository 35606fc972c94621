"""Every Triton kernel through the harness, on the rows of the case table.

bfloat16 is left out: the interpreter gets it wrong without an error. So are cases of many rows, which take it minutes.
`tests/triton/test_gpu.py` has both.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from memsave.ops.philox import row_words
from tests.cases.ops import CASES, SPECS, sampled_matmul
from tests.harness import OpCase, assert_same, check, has_kernel, implementation

KERNEL_CASES = [
    case
    for case in CASES
    if has_kernel(case.op, "triton")
    and not case.name.endswith("many_rows")
    and not any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in case.make())
]


def interpret(case: OpCase, launch: Callable[..., Any]) -> None:
    """The interpreter is the same in deterministic mode: once is enough."""
    check(case, launch, deterministic=(False,))


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_kernel(case: OpCase) -> None:
    interpret(case, implementation(case.op, "triton"))


def test_sliced_cases_are_sliced() -> None:
    module = import_module("memsave.ops.sampled_matmul.triton")
    for case in sampled_matmul.SLICED:
        dy, kept, rows, scale = case.make()
        assert module.slices(rows.numel(), dy.shape[1], kept.shape[1]) == 2
        assert module.workspace_bytes(dy, kept, rows, scale) == 2 * 5 * 9 * 4


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_tile(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that tuning may pick on a GPU; here `launch` takes the first."""
    module = import_module("memsave.ops.sampled_matmul.triton")
    monkeypatch.setitem(module.CONFIGS, dtype.itemsize, [module.CONFIGS[dtype.itemsize][tile]])
    make = sampled_matmul.arguments(300, 77, 129, 131, dtype)
    interpret(OpCase(SPECS["sampled_matmul"], f"tile_{tile}", make), module.launch)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    """The known answers that Random123 publishes for philox4x32-10."""
    from tests.triton.interpreted.philox_kernels import philox_words

    assert philox_words(torch.tensor(counter), torch.tensor(key)).tolist() == list(expected)


@pytest.mark.parametrize("stream", [0, 1, 7])
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_row_words_are_those_of_pytorch(seed: int, stream: int) -> None:
    from tests.triton.interpreted.philox_kernels import words_of_rows

    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3, 2**62])
    expected = row_words(rows, stream, torch.tensor(seed))
    assert_same(words_of_rows(rows, stream, torch.tensor(seed)), torch.stack(expected))


# op, what is right, what is wrong. Those that reach outside of their tensors stay within the guards of the harness.
MUTANTS = [
    ("gated_activation", "inside = f < F", "inside = f < F - 1"),
    ("gated_activation", "element_ty), mask=inside", "element_ty)"),
    ("gated_activation", "n * stride_gate_n", "n * F"),
    ("gated_activation", "f * stride_up_f", "f"),
    ("gated_activation", "y.to(h.dtype.element_ty)", "y.to(tl.float16)"),
    ("gated_activation", "rounded * factor", "rounded"),
    ("gated_activation_backward", "inside = f < F", "inside = f < F - 1"),
    ("gated_activation_backward", "dx.to(dgate.dtype.element_ty), mask=inside", "dx.to(dgate.dtype.element_ty)"),
    ("gated_activation_backward", "(upstream * y).to(dup.dtype.element_ty), mask=inside", "upstream * y"),
    ("gated_activation_backward", "n * stride_dh_n", "n * F"),
    ("gated_activation_backward", "f * stride_gate_f", "f"),
    ("gated_activation_backward", "upstream * factor * slope", "upstream * slope"),
    ("gated_activation_backward", "upstream * y", "y"),
    ("gather_rows", "r < K)[:, None]", "r < K - 1)[:, None]"),
    ("gather_rows", "(d < D)[None, :]", "(d < D - 1)[None, :]"),
    ("gather_rows", "values.to(out.dtype.element_ty), mask=inside", "values.to(out.dtype.element_ty)"),
    ("gather_rows", "else values) * factor", "else values) + 0 * factor"),
    ("gather_rows", "row[:, None] * stride_n", "(row[:, None].to(tl.float32) * stride_n).to(tl.int64)"),
    ("sampled_matmul", "valid = r < last", "valid = r < last - 1"),
    ("sampled_matmul", "valid = r < last", "valid = r < last + 1"),
    ("sampled_matmul", "* factor[None, :]", "+ 0 * factor[None, :]"),
    ("sampled_matmul", "row[None, :] * stride_dy_n", "(row[None, :].to(tl.float32) * stride_dy_n).to(tl.int64)"),
    ("sampled_matmul", "program_id(2).to(tl.int64) * OUT", "program_id(2).to(tl.int64) * 0"),
    (
        "sampled_matmul",
        "total, input_precision=PRECISION)",
        "total).to(tl.float16).to(tl.float32)",
    ),
    ("row_inclusion", "left * m >= rest", "left * m >= 2 * rest"),
    ("row_inclusion", "tl.full([], SHRINK, tl.float64)", "1.0"),
    ("row_inclusion", "other=0) + m", "other=0)"),
    ("row_inclusion", "remainder - room_before", "remainder - room_before - 1"),
    ("row_inclusion", "added - here + ONE, mask=i < N", "added - here + ONE"),
    ("draw_rows", "position - start - 1", "position - start"),
    ("draw_rows", "hits + before", "hits + 0 * before"),
    ("draw_rows", "0x7FFFFFFF", "0x3FFFFFFF"),
    ("draw_rows", "key, mask=i < N", "key"),
    ("rms_norm", "inside = d < D", "inside = d < D - 1"),
    ("rms_norm", "element_ty), mask=inside", "element_ty)"),
    ("rms_norm", "tl.full([], EPS, WIDE)", "0.0"),
    ("rms_norm", "/ D + ", "/ BLOCK + "),
    ("rms_norm", "r * stride_n", "r * D"),
    ("rms_norm", ".to(ROUNDED)", ".to(tl.float16)"),
    ("rms_norm", "scale.to(WIDE) + 1.0 if", "scale if"),
    ("rms_norm_backward", "inside = d < D", "inside = d < D - 1"),
    ("rms_norm_backward", "group * rows + rows, N)", "group * rows + rows, N - 1)"),
    ("rms_norm_backward", "group * rows + rows, N)", "group * rows + 1, N)"),
    ("rms_norm_backward", "total += dxhat", "total = dxhat"),
    ("rms_norm_backward", "scale + 1.0 if", "scale if"),
    ("rms_norm_backward", "r * stride_dy_n", "r * D"),
    ("rms_norm_backward", "total, mask=inside", "total"),
    ("rms_norm_backward", "- xhat * mean", "- mean"),
    ("layer_norm", "inside = d < D", "inside = d < D - 1"),
    ("layer_norm", "element_ty), mask=inside", "element_ty)"),
    ("layer_norm", "tl.where(inside, wide - tl.sum(wide) / D, 0.0)", "wide - tl.sum(wide) / D"),
    ("layer_norm", "tl.full([], EPS, WIDE)", "0.0"),
    ("layer_norm", "tl.sum(values * values) / D", "tl.sum(values * values) / BLOCK"),
    ("layer_norm", "r * stride_n", "r * D"),
    ("layer_norm", "d * stride_b", "d"),
    ("layer_norm_backward", "inside = d < D", "inside = d < D - 1"),
    ("layer_norm_backward", "group * rows + rows, N)", "group * rows + rows, N - 1)"),
    ("layer_norm_backward", "products += dxhat", "products = dxhat"),
    ("layer_norm_backward", "dys += dxhat", "dys = dxhat"),
    ("layer_norm_backward", "wide - tl.sum(wide) / D", "wide"),
    ("layer_norm_backward", "wide_d * stride_dy_d, mask=inside, other=0.0", "wide_d * stride_dy_d"),
    ("layer_norm_backward", "dxhat - tl.sum(dxhat) / D", "dxhat"),
    ("layer_norm_backward", "group * 2 * D + D + d", "group * 2 * D + d"),
    ("layer_norm_backward", "r * stride_dy_n", "r * D"),
    ("pack_bits", "& (d < D)", ""),
    ("pack_bits", "packed.to(tl.uint8), mask=i < NUM_BYTES", "packed.to(tl.uint8)"),
    ("pack_bits", "<< place[None, :]", "<< (7 - place[None, :])"),
    ("pack_bits", "row[:, None] * stride_n", "row[:, None] * D"),
    ("masked_scale", "inside = i < NUMEL", "inside = i < NUMEL - 1"),
    ("masked_scale", "element_ty), mask=inside", "element_ty)"),
    ("masked_scale", "row * stride_x_n", "row * D"),
    ("masked_scale", "row * stride_bits_n", "row * (D // 8)"),
    ("masked_scale", "tl.full([], SCALE, WIDE)", "tl.full([], SCALE, tl.float32)"),
    ("masked_scale", "values * factor", "tl.where(is_set == 1, values * factor, 0.0)"),
    ("logit_statistics", "inside = v < V", "inside = v < V - 1"),
    ("logit_statistics", "tl.max(tl.where(inside, z, NONE))", "tl.max(z) - 200.0"),
    ("logit_statistics", "exp_sum * tl.exp(before - shift).to(tl.float64)", "exp_sum"),
    ("logit_statistics", "tl.exp(z - shift), 0.0", "tl.exp(z - shift), 1.0"),
    ("logit_statistics", "tl.where(inside, z, 0.0)", "tl.where(inside, z, 1.0)"),
    ("logit_statistics", "inside & (v == place)", "inside & (v == place + 1)"),
    ("logit_statistics", "r * stride_n", "r * V"),
    ("logit_statistics", "r * stride_target", "r"),
    ("logit_statistics", "z = cap * tanh", "z = tanh"),
    ("logit_statistics", "tl.static_range(7)", "tl.static_range(6)"),
    ("logit_statistics_backward", "inside = v < V", "inside = v < V - 1"),
    ("logit_statistics_backward", "element_ty), mask=inside", "element_ty)"),
    ("logit_statistics_backward", "r * stride_n", "r * V"),
    ("logit_statistics_backward", "r * stride_d_total", "r"),
    ("logit_statistics_backward", "slope = 1.0 - tanh * tanh", "slope = 1.0 - tanh"),
    ("logit_statistics_backward", "- tl.load(log_sum", "+ 0 * tl.load(log_sum"),
    ("logit_statistics_backward", "v == tl.load(target", "v + 1 == tl.load(target"),
    ("logit_statistics_backward", "gradient * slope", "gradient"),
]


def test_every_kernel_has_mutants() -> None:
    assert {op for op, _, _ in MUTANTS} == {op for op in SPECS if has_kernel(op, "triton")}


@pytest.mark.parametrize("op, right, wrong", MUTANTS, ids=[f"{op}: {wrong}" for op, _, wrong in MUTANTS])
def test_a_broken_kernel_is_noticed(op: str, right: str, wrong: str, tmp_path: Path) -> None:
    """A test of the tests: a kernel with one mistake must fail on some row of the table."""
    source = Path(str(import_module(f"memsave.ops.{op}.triton").__file__)).read_text()
    assert source.count(right) == 1, f"the kernel no longer contains {right!r} once: update this mutant"
    path = tmp_path / "mutant.py"
    path.write_text(source.replace(right, wrong))
    spec = spec_from_file_location(f"memsave.ops.{op}.mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = module_from_spec(spec)
    spec.loader.exec_module(mutant)

    def passes(case: OpCase) -> bool:
        try:
            interpret(case, mutant.launch)
        except AssertionError:
            return False
        return True

    # Large rows last: most mistakes show in a small one.
    cases = sorted((case for case in KERNEL_CASES if case.op == op), key=lambda case: case.large)
    assert not all(passes(case) for case in cases)
