"""Every op on a GPU against the reference on the CPU, in all dtypes, without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch

from memsave import ops
from tests.cases.ops import CASES, OpCase, assert_same, assert_within_budget, matrix, row_indices, scales, to_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]

KERNELS = ("row_inclusion", "draw_rows", "gather_rows", "sampled_matmul")


@pytest.fixture(autouse=True)
def triton_serves() -> Iterator[None]:
    """Fails where Triton is missing: these tests would pass on the reference."""
    with ops.use_backend("triton"), torch.no_grad():
        yield


def check(case: OpCase, args: tuple[Any, ...], actual: Any) -> None:
    if case.exact:
        reference = import_module(f"memsave.ops.{case.op}.reference")
        assert_same(actual, getattr(reference, case.op)(*args))
    else:
        assert_within_budget(actual.cpu(), case.op, args)


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "new_seed"], ids=lambda case: case.id)
def test_op_on_the_gpu(case: OpCase) -> None:
    args = case.make()
    on_gpu = to_device(args, "cuda")
    op = getattr(ops, case.op)
    op(*on_gpu)  # compiles, and times the tiles, which waits for the GPU
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = op(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(case, args, actual)


@pytest.mark.parametrize("op", KERNELS)
def test_triton_is_active(op: str) -> None:
    assert ops.backends()[op]["cuda"]["active"] == "triton"


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k, d, o", [(4000, 512, 768), (5000, 1024, 16), (5001, 33, 16)])
def test_every_tile(k: int, d: int, o: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that tuning may pick, with one slice and with several."""
    configs = import_module("memsave.ops.sampled_matmul.triton").CONFIGS
    monkeypatch.setitem(configs, dtype.itemsize, [configs[dtype.itemsize][tile]])
    args = matrix(8192, o, dtype), matrix(k, d, dtype, value=5), row_indices(8192, k), scales(k)
    torch.use_deterministic_algorithms(True)  # no tuning: the first config is taken
    try:
        actual = ops.sampled_matmul(*to_device(args, "cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within_budget(actual.cpu(), "sampled_matmul", args)


def test_product_is_the_same_every_time() -> None:
    args = to_device((matrix(8192, 16), matrix(5000, 256, value=5), row_indices(8192, 5000), scales(5000)), "cuda")
    first = ops.sampled_matmul(*args)
    for _ in range(5):
        assert_same(ops.sampled_matmul(*args), first)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of a matrix of more than 2^31 elements."""
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    x = torch.zeros(2**20 + 8, 2**11 + 8, dtype=torch.bfloat16, device="cuda")
    rows = torch.arange(2**20, 2**20 + 8, dtype=torch.int32, device="cuda")
    x[2**20 :] = torch.arange(1.0, 9.0, device="cuda")[:, None]
    assert_same(ops.gather_rows(x, rows), x[2**20 :])
    product = ops.sampled_matmul(x, torch.eye(8, dtype=x.dtype, device="cuda"), rows, torch.ones(8, device="cuda"))
    assert_same(product, x[2**20 :].t().contiguous())


def test_row_words_on_the_gpu() -> None:
    """The kernels' generator for rows on both sides of 2^32, which no draw is large enough to reach."""
    from memsave.ops.philox import row_words
    from tests.triton.interpreted.philox_kernels import words_of_rows

    rows = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3, 2**62])
    seed = torch.tensor(2**63 - 25)
    words = words_of_rows(rows.cuda(), 1, seed.cuda())
    assert_same(words, torch.stack(row_words(rows, 1, seed)))
