"""`gather_rows` and `sampled_matmul`: values by hand, refusals. The case table has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memsave import ops
from memsave.ops import _native
from tests.cases.ops.inputs import matrix, row_indices, scales
from tests.harness import assert_same

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows, scale = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([0.5, 2.0])
    with ops.use_backend(backend):
        assert ops.gather_rows(x, rows).tolist() == [[5.0, 6.0], [1.0, 2.0]]
        assert ops.gather_rows(x, rows, scale).tolist() == [[2.5, 3.0], [2.0, 4.0]]
        kept = torch.tensor([[1.0], [10.0]])
        assert ops.sampled_matmul(x, kept, rows, scale).tolist() == [[22.5], [43.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value_survives_and_every_product_is_rounded_to_nearest(backend: str, dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    rows = torch.arange(256, dtype=torch.int32)
    with ops.use_backend(backend):
        assert_same(ops.gather_rows(x, rows, torch.ones(256)), x)
        for factor in (1 / 3, 1.5, 2.0**-10, 3e4):
            product = ops.gather_rows(x, rows, torch.full((256,), factor))
            assert_same(product, (x.float() * torch.tensor(factor)).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 6])
def test_rows_outside_are_refused(backend: str, bad: int) -> None:
    rows = torch.tensor([0, bad, 1], dtype=torch.int32)
    with ops.use_backend(backend), pytest.raises(IndexError):
        ops.gather_rows(matrix(6, 4), rows, scales(3))
    with ops.use_backend(backend), pytest.raises(IndexError):
        ops.sampled_matmul(matrix(6, 4), matrix(3, 2), rows, scales(3))


X, ROWS, SCALE, KEPT = matrix(6, 4), row_indices(6, 3), scales(3), matrix(3, 5)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("gather_rows", (X.int(), ROWS, SCALE), "x must be a 2-D float16"),
        ("gather_rows", (X.to(torch.complex64), ROWS, SCALE), "torch.complex64"),
        ("gather_rows", (X[0], ROWS, SCALE), "x must be a 2-D"),
        ("gather_rows", (X, ROWS.long(), SCALE), "rows must be a 1-D torch.int32"),
        ("gather_rows", (X, ROWS, SCALE.double()), "scale must be a 1-D torch.float32"),
        ("gather_rows", (X, ROWS, SCALE[:2]), "each of the 3 rows kept"),
        ("gather_rows", (X, ROWS, SCALE.to("meta")), "one device; got x on cpu"),
        ("sampled_matmul", (X.int(), KEPT, ROWS, SCALE), "dy must be a 2-D"),
        ("sampled_matmul", (X, KEPT.half(), ROWS, SCALE), "kept must be a 2-D torch.float32"),
        ("sampled_matmul", (X, KEPT[:2], ROWS, SCALE), "kept must have one entry for each of the 3"),
        ("sampled_matmul", (X, KEPT, ROWS, SCALE[:2]), "scale must have one entry"),
        ("sampled_matmul", (X, KEPT, ROWS[None], SCALE), "rows must be a 1-D"),
        ("sampled_matmul", (X, KEPT.to("meta"), ROWS, SCALE), "one device"),
    ],
)
def test_bad_input_is_refused(op: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_input_that_requires_grad_is_refused_not_cut_off(compiled: bool) -> None:
    x, kept = matrix(6, 4).requires_grad_(), KEPT.clone().requires_grad_()

    def gather(t: Tensor) -> Tensor:
        return ops.gather_rows(t, ROWS)

    run = torch.compile(gather, backend="aot_eager", fullgraph=True) if compiled else gather
    with pytest.raises(RuntimeError, match="has no derivative"):
        run(x)
    if not compiled:
        with pytest.raises(RuntimeError, match="has no derivative"):
            ops.sampled_matmul(X, kept, ROWS, SCALE)
        with torch.no_grad():
            assert not ops.gather_rows(x, ROWS).requires_grad
