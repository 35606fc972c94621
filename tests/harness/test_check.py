"""A test of the harness: what is right passes, and each mistake of `wrong.py` is noticed for what it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases.ops import CASES, cases_of
from tests.cases.ops.inputs import matrix
from tests.harness import OpCase, OpSpec, assert_same, assert_within_budget, check, implementation
from tests.harness.wrong import MISTAKES


def complaints(cases: list[OpCase], run: Callable[..., Any]) -> Iterator[str]:
    """What the harness says to an implementation."""
    for case in cases:
        try:
            check(case, run)
        except AssertionError as error:
            assert str(error).startswith(f"{case.id} on cpu ("), "the harness must name op and row"
            yield str(error)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    op, says, wrong = MISTAKES[name]
    said = []
    for complaint in complaints(cases_of(op), wrong):
        said.append(complaint)
        if re.search(says, complaint):
            return
    raise AssertionError(f"no row says {says!r}, only: {said}")


def test_only_a_row_beyond_the_integers_of_float32_shows_an_index_in_float32() -> None:
    """Without that row the mistake would pass: it is what the row is for."""
    (said,) = complaints(cases_of("gather_rows"), MISTAKES["index_in_float32"].implementation)
    assert "beyond_float32_integers" in said and "3 of 4 elements differ, first at (1, 0)" in said


def two_outputs(exact: bool | tuple[bool, ...]) -> OpCase:
    """A made-up op, as a backward would be: a product and its row numbers."""

    def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.double() @ x.double().t(), x.argmax(1)

    def plain(x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ x.t(), x.argmax(1)

    return OpCase(OpSpec("two_outputs", oracle, plain, exact), "odd", lambda: (matrix(7, 5, torch.bfloat16),))


def test_each_output_has_its_own_rule() -> None:
    case = two_outputs(exact=(False, True))
    plain = case.spec.plain
    assert plain is not None
    check(case, plain)
    with pytest.raises(AssertionError, match="output 1: 7 of 7 elements differ"):
        check(case, lambda x: (plain(x)[0], plain(x)[1] + 1))
    with pytest.raises(AssertionError, match="output 0: error .* against float64"):
        check(case, lambda x: (plain(x)[0] * 1.1, plain(x)[1]))
    with pytest.raises(AssertionError, match="output 0: dtype torch.bfloat16, expected torch.float64"):
        check(two_outputs(exact=True), plain)


def test_an_output_that_rounds_needs_a_plain_expression() -> None:
    case = OpCase(OpSpec("double", lambda x: x.double() * 2, exact=False), "odd", lambda: (matrix(3, 3),))
    with pytest.raises(AssertionError, match="double: an output that rounds needs `plain`"):
        check(case, lambda x: x * 2)


def test_nothing_of_a_check_is_left_behind() -> None:
    """The surrounding modes and random numbers are those from before, also after a failure."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(CASES[0], implementation("new_seed", "reference"))
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(AssertionError):
        check(cases_of("sampled_matmul")[0], lambda *args: torch.zeros(1), deterministic=(True,))
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(torch.rand(4), expected)
    assert torch.empty(0).untyped_storage().nbytes() == 0


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (torch.tensor([0.0, -0.0]), torch.tensor([0.0, 0.0]), r"1 of 2 elements differ, first at \(1,\): -0.0"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), r"first at \(1,\): nan, expected 2.0"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), r"first at \(1,\): 2.0, expected nan"),
        (torch.tensor(1), torch.tensor(2), r"1 of 1 elements differ, first at \(\): 1, expected 2"),
        (torch.ones(2), torch.ones(2, 1), r"shape \(2,\), expected \(2, 1\)"),
        (torch.ones(2), torch.ones(2).double(), "dtype torch.float32, expected torch.float64"),
    ],
)
def test_same_means_the_same_bits(actual: Tensor, expected: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same(actual, expected)


def test_nan_equals_nan() -> None:
    assert_same(torch.tensor([float("nan"), -0.0]), torch.tensor([float("nan"), -0.0]))


def test_infinities_must_be_the_same_and_set_no_budget() -> None:
    exact = torch.tensor([1.0, -torch.inf, torch.inf], dtype=torch.float64)
    plain = exact.float()
    assert_within_budget(plain, exact, plain)
    for wrong in (
        [1.0, torch.inf, torch.inf],
        [1.0, 0.0, torch.inf],
        [1.0, torch.nan, torch.inf],
        [1.1, -torch.inf, torch.inf],
    ):
        with pytest.raises(AssertionError, match="1 of 3 elements differ"):
            assert_within_budget(torch.tensor(wrong), exact, plain)
    with pytest.raises(AssertionError, match="1 of 1 elements differ"):
        assert_within_budget(torch.tensor([torch.inf]), exact[:1], plain[:1])
