"""A test of the test that the case table is complete: each kind of row that is taken away is missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from memsave import ops
from tests.cases.ops import SPECS, cases_of
from tests.harness.coverage import accepted_dtypes, missing_rows


def without(op: str, drop: Callable[[tuple[Any, ...]], bool]) -> list[str]:
    return missing_rows(SPECS[op], getattr(ops, op), [case for case in cases_of(op) if not drop(case.make())])


@pytest.mark.parametrize(
    ("op", "drop", "missing"),
    [
        ("gather_rows", lambda args: True, "any row"),
        ("gather_rows", lambda args: args[0].dtype == torch.bfloat16, "a row where argument 0 is torch.bfloat16"),
        ("sampled_matmul", lambda args: args[1].dtype == torch.float16, "a row where argument 1 is torch.float16"),
        ("row_inclusion", lambda args: args[0].dtype == torch.float64, "a row where argument 0 is torch.float64"),
        ("gather_rows", lambda args: 0 in (len(args[1]), args[0].shape[1]), "a row with an empty tensor"),
        ("new_seed", lambda args: args[0].numel() == 0, "a row with an empty tensor"),
        (
            "gather_rows",
            lambda args: len(args[1]) == 5,
            "a row where argument 2 is not contiguous",
        ),
        ("draw_rows", lambda args: not args[0].is_contiguous(), "a row where argument 0 is not contiguous"),
        ("sampled_matmul", lambda args: args[0].shape[0] % 2 == 1, "a row where every size is odd"),
        ("draw_rows", lambda args: len(args[0]) % 2 == 1, "a row where every size is odd"),
    ],
)
def test_a_missing_row_is_missed(op: str, drop: Callable[..., bool], missing: str) -> None:
    assert missing in without(op, drop)


def test_that_an_op_takes_no_empty_tensor_is_tried() -> None:
    """A row without elements cannot be left out by claiming that the op refuses it."""
    spec, case = SPECS["row_inclusion"], cases_of("row_inclusion")[0]
    assert "a row with an empty tensor" not in missing_rows(spec, ops.row_inclusion, [case])
    assert "a row with an empty tensor" in missing_rows(spec, lambda weights, k: weights, [case])


def test_accepted_dtypes_are_tried_with_and_without_the_arguments_that_share_theirs() -> None:
    def needs_equal_floats(a: Tensor, b: Tensor, c: Tensor) -> None:
        if a.dtype != b.dtype or not a.is_floating_point() or c.dtype != torch.float32:
            raise ValueError

    args = (torch.ones(2), torch.ones(2), torch.ones(2))
    floats = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    assert [accepted_dtypes(needs_equal_floats, args, i) for i in range(3)] == [floats, floats, [torch.float32]]


def test_that_an_argument_may_have_no_gaps_in_memory_is_tried() -> None:
    spec, cases = SPECS["selected_attention_backward"], cases_of("selected_attention_backward")
    assert missing_rows(spec, ops.selected_attention_backward, cases) == []

    def takes_all(*args: Any) -> Any:
        tensors = [a.contiguous() if isinstance(a, Tensor) else a for a in args]
        return ops.selected_attention_backward(*tensors)

    missed = missing_rows(spec, takes_all, cases)
    assert missed == [f"a row where argument {i} is not contiguous" for i in spec.writes]


def test_fixed_sizes_need_not_be_odd_but_others_must() -> None:
    spec, cases = SPECS["pq_select"], cases_of("pq_select")
    assert spec.fixed == (16,)
    assert missing_rows(spec, ops.pq_select, cases) == []
    assert missing_rows(replace(spec, fixed=()), ops.pq_select, cases) == ["a row where every size is odd"]
