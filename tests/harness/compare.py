"""Comparison of results: the same bits, or an error within twice that of plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_same(actual: Any, expected: Any, where: str = "result") -> None:
    """Same dtype, shape and bits, NaN equal to NaN; on any devices; tensors or tuples of them.

    Raises:
        AssertionError: what differs, how often, and the first place.
    """
    if isinstance(expected, tuple):
        assert isinstance(actual, tuple), f"{where}: one tensor, expected {len(expected)}"
        assert len(actual) == len(expected), f"{where}: {len(actual)} outputs, expected {len(expected)}"
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, e, f"{where}, output {i}")
        return
    _assert_same_form(actual, expected.shape, expected.dtype, where)
    found, right = actual.cpu(), expected.cpu()
    wrong = found != right
    if right.is_floating_point():
        wrong |= found.signbit() != right.signbit()
        wrong &= ~(found.isnan() & right.isnan())
    if wrong.any():
        raise AssertionError(f"{where}: {_places(wrong, found, right)}")


def assert_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, where: str = "result", *, slack: float = 0.0
) -> None:
    """Largest error against float64 at most twice that of plain PyTorch, or of one rounding where that has less.

    What is infinite must be so, and does not count otherwise.

    Args:
        actual: the result, in the dtype of `plain`.
        exact: float64.
        plain: what plain PyTorch gives.
        slack: see `OpSpec`.
    """
    _assert_same_form(actual, exact.shape, plain.dtype, where)
    if not exact.numel():
        return
    exact, found = exact.cpu(), actual.cpu().double()
    errors = _errors(found, exact)
    eps, largest = torch.finfo(actual.dtype).eps, exact.abs().masked_fill(exact.isinf(), 0.0).max().item()
    error_of_plain = _errors(plain.cpu().double(), exact).max().item()
    budget = 2 * max(error_of_plain, eps / 2 * largest, slack / 2 * eps * (1 + largest))
    wrong = ~(errors <= budget)
    if wrong.any():
        error = errors.max().item()  # NaN if there is one
        places = _places(wrong, found, exact)
        raise AssertionError(f"{where}: error {error:.3g} against float64, the budget is {budget:.3g}; {places}")


def _errors(found: Tensor, exact: Tensor) -> Tensor:
    return (found - exact).abs().masked_fill((found == exact) & exact.isinf(), 0.0)


def _assert_same_form(actual: Tensor, shape: torch.Size, dtype: torch.dtype, where: str) -> None:
    assert actual.shape == shape, f"{where}: shape {tuple(actual.shape)}, expected {tuple(shape)}"
    assert actual.dtype == dtype, f"{where}: dtype {actual.dtype}, expected {dtype}"


def _places(wrong: Tensor, found: Tensor, right: Tensor) -> str:
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ, "
        f"first at {first}: {found[first].item()}, expected {right[first].item()}"
    )
