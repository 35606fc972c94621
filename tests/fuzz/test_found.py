"""What fuzzing found, each as the smallest input that showed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memsave
from memsave import ops
from memsave.ops import _native
from tests.cases.ops import selected_attention, selected_attention_backward
from tests.cases.ops.inputs import matrix, packed
from tests.harness import assert_same

needs_native = pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")
BAD_LISTS = [[2**31 - 1], [23], [-2], [3, 23], [5, -1, 7], [4, 4], [4, 3], [-1, 2], [0, 1, 2, 3, -(2**31)]]


@needs_native
@pytest.mark.parametrize("bad", BAD_LISTS, ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_lists_that_point_outside_of_the_keys_are_refused(bad: list[int], backward: bool) -> None:
    """The kernels read wherever a list pointed."""

    def make() -> tuple[Any, ...]:
        return selected_attention.arguments(keep=len(bad), S=23, fewer=False)

    args = selected_attention_backward.with_gradients(make) if backward else make()
    args[4 if backward else 3][1, 1, 7] = torch.tensor(bad)
    sums = [t.clone() for t in args[8:10]] if backward else []
    op = ops.selected_attention_backward if backward else ops.selected_attention
    with ops.use_backend("native"), pytest.raises(IndexError, match=r"list 64 is \[.*in \[0, 23\), then -1"):
        op(*args)
    assert_same(tuple(args[8:10]) if backward else (), tuple(sums))


def test_masked_scale_takes_bits_of_any_strides() -> None:
    x, bits = matrix(3, 19), packed(3, 19)
    with ops.use_backend("reference"):
        assert_same(ops.masked_scale(x, bits.t().contiguous().t(), 2.0), ops.masked_scale(x, bits, 2.0))


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_masked_scale_refuses_what_times_zero_is_not_zero(scale: float) -> None:
    """Plain PyTorch gave -0.0 or NaN where a bit is not set, the kernel 0.0."""
    with pytest.raises(ValueError, match="scale must be a finite factor"):
        ops.masked_scale(matrix(3, 19), packed(3, 19), scale)


@pytest.mark.parametrize("pattern", ["a{99999999999999999999}", "(" * 5000 + ")" * 5000])
def test_a_pattern_that_cannot_be_compiled_is_a_value_error(pattern: str) -> None:
    with pytest.raises(ValueError, match="target_modules: .* is not a regular expression"):
        memsave.WTACRSConfig(target_modules=pattern)


@pytest.mark.parametrize("text", ["null", "[]", '[["method", "wta_crs"]]', "[" * 100_000, "3"])
def test_texts_that_are_no_config(text: str) -> None:
    with pytest.raises(ValueError):
        memsave.MethodConfig.from_json(text)


def test_integers_beyond_every_float_are_refused() -> None:
    for make in (
        lambda: memsave.RoutedFFNConfig(target_modules=["x"], balance_loss=10**400),
        lambda: memsave.FlashSVDConfig(target_modules=["x"], rank=1, damping=10**400),
    ):
        with pytest.raises(ValueError, match="balance_loss|damping"):
            make()
