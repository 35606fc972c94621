"""Rows of logits that are not finite, where no error can be measured, and what the two ops refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memsave import ops
from memsave.ops import _native
from tests.cases.ops.inputs import FLOATS, matrix

INF, NAN = float("inf"), float("nan")
BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [3, 2000])
def test_logsumexp_and_gradient_of_infinite_and_undefined_logits(
    dtype: torch.dtype, backend: str, classes: int
) -> None:
    logits = matrix(6, classes, dtype)
    logits[0, 1:] = -INF
    logits[1] = -INF
    logits[2, -1] = INF
    logits[3, 1] = NAN
    logits[4, -1] = NAN
    logits[5, :2] = torch.tensor([-2e4, 2e4])
    target, expected = torch.zeros(6, dtype=torch.int64), logits.to(torch.float64).logsumexp(1)
    with ops.use_backend(backend):
        peak, log_sum, at_target, total = ops.logit_statistics(logits, target)
        torch.testing.assert_close((peak + log_sum).double(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert peak[:3].isfinite().all()
        torch.testing.assert_close(at_target, logits[:, 0].to(peak.dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(total.double(), logits.double().sum(1), equal_nan=True, rtol=1e-5, atol=0.01)
        ones, zeros = torch.ones_like(peak), torch.zeros_like(peak)
        ops.logit_statistics_backward(logits, target, peak, log_sum, ones, zeros, zeros)
    assert logits[0].tolist() == [1.0] + [0.0] * (classes - 1)
    assert logits[1].isnan().all() and logits[3].isnan().all() and logits[4].isnan().all()
    assert logits[5].tolist() == [0.0, 1.0] + [0.0] * (classes - 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_classes_the_sum_of_exponentials_is_zero(backend: str) -> None:
    with ops.use_backend(backend):
        peak, log_sum, at_target, total = ops.logit_statistics(torch.empty(2, 0), torch.zeros(2, dtype=torch.int64))
    assert [t.tolist() for t in (peak, log_sum, at_target, total)] == [[0, 0], [-INF, -INF], [0, 0], [0, 0]]


def statistics(**wrong: Any) -> None:
    ops.logit_statistics(**{"logits": torch.ones(2, 3), "target": torch.zeros(2, dtype=torch.int64)} | wrong)


def gradient(**wrong: Any) -> None:
    numbers = dict.fromkeys(("peak", "log_sum", "d_lse", "d_target", "d_total"), torch.ones(2))
    given = {"logits": torch.ones(2, 3), "target": torch.zeros(2, dtype=torch.int64), **numbers}
    ops.logit_statistics_backward(**given | wrong)


@pytest.mark.parametrize("call", [statistics, gradient])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": torch.ones(2)}, "logits must be a 2-D float16"),
        ({"target": torch.zeros(2)}, "target must be a 1-D torch.int64"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have one entry for each of the 2 rows of logits"),
        ({"target": torch.zeros(2, dtype=torch.int64, device="meta")}, "all tensors must be on one device"),
        ({"softcap": 0.0}, "softcap must be above 0, or None for none; got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**wrong)


@pytest.mark.parametrize("name", ["peak", "log_sum", "d_lse", "d_target", "d_total"])
def test_numbers_of_another_dtype_or_length_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a 1-D torch.float32 tensor; got torch.float64"):
        gradient(**{name: torch.ones(2).double()})
    with pytest.raises(ValueError, match=f"{name} must have one entry for each of the 2 rows"):
        gradient(**{name: torch.ones(3)})
