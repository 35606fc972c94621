"""Every Triton kernel through the harness, on the rows of the case table."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from memsave.ops.philox import row_words
from tests.cases.ops import SPECS, sampled_matmul, sddmm
from tests.harness import OpCase, assert_same, implementation

from .kernels import KERNEL_CASES, interpret


@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.id)
def test_kernel(case: OpCase) -> None:
    interpret(case, implementation(case.op, "triton"))


def test_sliced_cases_are_sliced() -> None:
    module = import_module("memsave.ops.sampled_matmul.triton")
    for case in sampled_matmul.SLICED:
        dy, kept, rows, scale = case.make()
        assert module.slices(rows.numel(), dy.shape[1], kept.shape[1]) == 2
        assert module.workspace_bytes(dy, kept, rows, scale) == 2 * 5 * 9 * 4


def test_sddmm_cases_take_both_forms() -> None:
    """Entries that are summed, over one chunk of tokens or two, and that are taken from one block or several."""
    module = import_module("memsave.ops.sddmm.triton")
    found = set()
    for case in KERNEL_CASES:
        if case.op == "sddmm":
            a, b, indices = case.make()
            if module.is_dense(a, b, indices):
                found.add((a.dtype, "blocks", min(2, -(-a.shape[1] // module.block_rows(a, b)))))
            else:
                found.add((a.dtype, "chunks", min(2, -(-a.shape[0] // module.chunk_tokens(a, b)))))
    for dtype in (torch.float16, torch.float32):
        assert found >= {(dtype, "blocks", 1), (dtype, "chunks", 1), (dtype, "chunks", 2)}
    assert (torch.float32, "blocks", 2) in found


@pytest.mark.parametrize("entries, tokens", [(16, 64), (64, 64), (16, 256), (32, 256)])
def test_every_sddmm_tile(entries: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that benchmarks/cases/tiles.py tries on a GPU."""
    module = import_module("memsave.ops.sddmm.triton")
    monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)
    monkeypatch.setattr(module, "BLOCK_TOKENS", tokens)
    make = sddmm.arguments(2200, 61, 67, 25)
    interpret(OpCase(SPECS["sddmm"], f"tile_{entries}_{tokens}", make), module.launch)


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
