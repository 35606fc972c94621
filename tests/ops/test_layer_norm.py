"""`layer_norm` and its gradients: bits, threads, values by hand, refusals. The case table has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from memsave import ops
from memsave.ops import _native
from tests.cases.ops.inputs import FLOATS, HALF, matrix
from tests.harness import assert_same
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str, dtype: torch.dtype) -> None:
    x, weight = torch.tensor([[3.0, 5.0], [1.0, 1.0]], dtype=dtype), torch.tensor([2.0, -1.0], dtype=dtype)
    with ops.use_backend(backend):
        y, rstd = ops.layer_norm(x, weight, torch.tensor([0.0, 8.0]), 3.0)  # variance 1, and eps: 4
        assert rstd.tolist() == [0.5, pytest.approx(3.0**-0.5)]
        assert y.tolist() == [[-1.0, 7.5], [0.0, 8.0]]
        dx, dweight, dbias = ops.layer_norm_backward(torch.ones(2, 2, dtype=dtype), x, rstd, weight)
        # dxhat = (2, -1) with mean 0.5, xhat = (-0.5, 0.5), mean(dxhat * xhat) = -0.75
        assert dx[0].tolist() == [0.5 * (2 - 0.5 - 0.5 * 0.75), 0.5 * (-1 - 0.5 + 0.5 * 0.75)]
        assert dweight.tolist() == [-0.5, 0.5]
        assert dbias.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("columns", [1, 3, 8, 19, 63, 777, 1025])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_on_the_cpu_the_output_has_the_bits_of_torch(affine: tuple[bool, bool], columns: int) -> None:
    """Also where torch itself would keep the statistics in a half type."""
    for dtype in FLOATS:
        for parameter_dtype in {dtype, torch.float32} if dtype in HALF else {dtype}:
            weight, bias = (
                matrix(1, columns, parameter_dtype, value=value)[0] if given else None
                for value, given in zip((7, 9), affine, strict=True)
            )
            x = matrix(5, columns, dtype)
            expected = F.layer_norm(x, (columns,), weight, bias, 1e-5)
            assert_same(ops.layer_norm(x, weight, bias, 1e-5)[0], expected, f"{dtype} {parameter_dtype}")


@pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")
def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    x, dy = (matrix(1300, 67, torch.bfloat16, value=v) for v in (1, 5))
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(ops.layer_norm_backward(dy, x, torch.ones(1300), torch.ones(67)))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


X, W, RSTD = matrix(6, 4), torch.ones(4), torch.ones(6)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("layer_norm", (X.int(), W, W, 0.0), "x must be a 2-D float16"),
        ("layer_norm", (X[0], W, W, 0.0), "x must be a 2-D"),
        ("layer_norm", (X, W[:3], W, 0.0), "each of the 4 features of x"),
        ("layer_norm", (X, W, W.int(), 0.0), "bias must be a 1-D"),
        ("layer_norm", (X, W, W.to("meta"), 0.0), "one device; got x on cpu"),
        ("layer_norm_backward", (X[:5], X, RSTD, W), r"dy must have the shape of x, \(6, 4\); got \(5, 4\)"),
        ("layer_norm_backward", (X, X, RSTD[:5], W), "each of the 6 rows of x"),
        ("layer_norm_backward", (X, X, RSTD.half(), W), "rstd must be a 1-D torch.float32"),
        ("layer_norm_backward", (X, X, RSTD, W[:2]), "each of the 4 features of x"),
    ],
)
def test_bad_input_is_refused(op: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)
