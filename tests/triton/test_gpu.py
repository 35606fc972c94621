"""Every op on a GPU through the harness, in all dtypes, without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch

from memsave import ops
from tests.cases.ops import CASES, SPECS, sampled_matmul
from tests.harness import OpCase, assert_same, check, guarded, has_kernel, implementation

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA or ROCm device"),
]


def on_gpu(case: OpCase) -> tuple[Any, ...]:
    """The arguments of a row on the GPU, with their strides."""
    return tuple(guarded(a, "cuda").tensor if isinstance(a, torch.Tensor) else a for a in case.make())


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_op_on_the_gpu(case: OpCase) -> None:
    """What the op runs there: the Triton kernel, or plain PyTorch where the op has none."""
    args = on_gpu(case)
    with ops.use_backend("triton"):  # an error where Triton is missing
        getattr(ops, case.op)(*args)  # compiles, and times the tiles, which waits for the GPU
        with waiting_is_an_error():
            getattr(ops, case.op)(*args)
    check(case, implementation(case.op, "triton"), "cuda")


@pytest.mark.parametrize("op", [op for op in SPECS if has_kernel(op, "triton")])
def test_triton_is_active(op: str) -> None:
    assert ops.backends()[op]["cuda"]["active"] == "triton"


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("k, d, o", [(4000, 512, 768), (5000, 1024, 16), (5001, 33, 16)])
def test_every_tile(k: int, d: int, o: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile that tuning may pick, with one slice and with several; deterministic mode takes the first."""
    module = import_module("memsave.ops.sampled_matmul.triton")
    monkeypatch.setitem(module.CONFIGS, dtype.itemsize, [module.CONFIGS[dtype.itemsize][tile]])
    case = OpCase(SPECS["sampled_matmul"], f"tile_{tile}", sampled_matmul.arguments(8192, k, d, o, dtype))
    check(case, module.launch, "cuda", deterministic=(True,))


def test_product_is_the_same_every_time() -> None:
    args = on_gpu(OpCase(SPECS["sampled_matmul"], "sliced", sampled_matmul.arguments(8192, 5000, 256, 16)))
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
