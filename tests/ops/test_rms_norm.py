"""`rms_norm` and its gradients: bits, threads, values by hand, refusals. The case table has the rest."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from memsave import ops
from memsave.ops import _native
from memsave.ops.rms_norm import Style
from tests.cases.ops.inputs import FLOATS, matrix
from tests.harness import assert_same
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)
native = pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    x, weight = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([2.0, -1.0])
    with ops.use_backend(backend):
        y, rstd = ops.rms_norm(x, weight, 3.5, Style.ONE_PLUS)  # mean square 12.5, and eps: 16
        assert rstd.tolist() == [0.25, pytest.approx(3.5**-0.5)]
        assert y.tolist() == [[2.25, 0.0], [0.0, 0.0]]
        dx, dweight = ops.rms_norm_backward(torch.ones(2, 2), x, rstd, weight, Style.ONE_PLUS)
        # dxhat = (3, 0), xhat = (0.75, 1), mean(dxhat * xhat) = 1.125
        assert dx[0].tolist() == [0.25 * (3 - 0.75 * 1.125), 0.25 * (0 - 1.125)]
        assert dweight.tolist() == [0.75, 1.0]


@native
@pytest.mark.parametrize("columns", [1, 3, 8, 19, 63, 777, 1024, 1025, 5000])
def test_the_kernel_has_the_bits_of_plain_pytorch(columns: int) -> None:
    """So a converted model computes exactly what the plain one does."""
    for dtype, weight_dtype, style in product(FLOATS, (None, *FLOATS), Style):
        weight = None if weight_dtype is None else matrix(1, columns, weight_dtype, value=7)[0]
        args = matrix(5, columns, dtype), weight, 1e-6, style, dtype == torch.float64
        with ops.use_reference():
            expected = ops.rms_norm(*args)
        assert_same(ops.rms_norm(*args), expected, f"{dtype} {weight_dtype} {style.name}")


@native
def test_gradients_do_not_depend_on_the_number_of_threads() -> None:
    args = matrix(1300, 67), matrix(1300, 67, value=5), torch.ones(1300), torch.ones(67), Style.ONE_PLUS
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(ops.rms_norm_backward(*args))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


X, W, RSTD = matrix(6, 4), torch.ones(4), torch.ones(6)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("rms_norm", (X.int(), W, None, 0), "x must be a 2-D float16"),
        ("rms_norm", (X[0], W, None, 0), "x must be a 2-D"),
        ("rms_norm", (X, W[:3], None, 0), "each of the 4 features of x"),
        ("rms_norm", (X, W.int(), None, 0), "weight must be a 1-D"),
        ("rms_norm", (X, W, None, 4), r"style must be one of CAST_THEN_SCALE \(0\), .*; got 4"),
        ("rms_norm", (X, W.to("meta"), None, 0), "one device; got x on cpu"),
        ("rms_norm_backward", (X[:5], X, RSTD, W, 0), r"dy must have the shape of x, \(6, 4\); got \(5, 4\)"),
        ("rms_norm_backward", (X, X, RSTD[:5], W, 0), "each of the 6 rows of x"),
        ("rms_norm_backward", (X, X, RSTD.half(), W, 0), "rstd must be a 1-D torch.float32"),
    ],
)
def test_bad_input_is_refused(op: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args)
