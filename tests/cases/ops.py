"""The case table of the ops: every row drives the tests of every backend, opcheck and the fp64 oracle.

N rows, D and O features, k kept rows. Arguments are made on the CPU from fixed seeds; `to_device` moves them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF, torch.float64)


@dataclass(frozen=True)
class OpCase:
    """One call of one op.

    Attributes:
        op: name of the op, also of its public function in `memsave.ops`.
        name: what is special about this row.
        make: builds the positional arguments, the same ones at each call.
        exact: every backend must give the same bits (NaN equal to NaN); else within the error budget.
        large: too many rows for an interpreter.
    """

    op: str
    name: str
    make: Callable[[], tuple[Any, ...]]
    exact: bool = True
    large: bool = False

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"


def to_device(args: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """The same arguments on another device, with their strides."""
    return tuple(_move(a, device) if isinstance(a, Tensor) else a for a in args)


def _move(tensor: Tensor, device: str) -> Tensor:
    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return tensor.to(device) if 0 in tensor.stride() else moved.copy_(tensor)


def seed(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def generator(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def log_normal(n: int, sigma: float = 1.0, value: int = 0) -> Tensor:
    return (sigma * torch.randn(n, generator=generator(value))).exp()


def inclusion(n: int, k: int, sigma: float = 1.0) -> Tensor:
    """(n,) int64 with sum k * 2^32: what `row_inclusion` gives, from the reference."""
    from memsave.ops.row_inclusion.reference import row_inclusion

    return row_inclusion(log_normal(n, sigma, value=n), k)


def matrix(n: int, d: int, dtype: torch.dtype = torch.float32, value: int = 1) -> Tensor:
    return torch.randn(n, d, generator=generator(value)).to(dtype)


def row_indices(n: int, k: int, value: int = 2) -> Tensor:
    """(k,) int32 ascending, no duplicates."""
    return torch.randperm(n, generator=generator(value))[:k].sort().values.to(torch.int32)


def scales(k: int, value: int = 3) -> Tensor:
    return 0.5 + torch.rand(k, generator=generator(value))


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _weights_cases() -> list[tuple[str, Callable[[], Tensor], int, bool]]:
    """(name, weights, k, large): what `row_inclusion` and `draw_winners` are called with."""
    special = [float("nan"), float("inf"), 0.0, 1.0, -2.0, 3.0]
    return [
        ("one_of_two", lambda: torch.tensor([1.0, 3.0]), 1, False),
        ("equal", lambda: torch.ones(7), 3, False),
        ("zeros", lambda: torch.zeros(9), 4, False),
        ("all_but_one", lambda: log_normal(64), 63, False),
        ("two_heavy_ones", lambda: torch.tensor([4.0, 4.0, 1.0, 1.0, 1.0, 1.0]), 4, False),
        # The integer weight of the last row is the sum of the two others: its share is exactly 1.
        ("exactly_at_the_cap", lambda: torch.tensor([1 - 2.0**-24, 63 * 2.0**-30, 1.0]), 2, False),
        ("heavy_tail", lambda: log_normal(100, sigma=4.0), 30, False),
        ("geometric", lambda: 0.5 ** torch.arange(40.0), 20, False),
        ("one_huge", lambda: torch.tensor([1e30] + [1.0] * 32), 5, False),
        ("not_finite", lambda: torch.tensor(special), 3, False),
        ("all_nan", lambda: torch.full((5,), float("nan")), 2, False),
        ("tiny", lambda: 1e-40 * torch.arange(1.0, 8.0), 3, False),
        ("float16", lambda: log_normal(33).half(), 11, False),
        ("bfloat16", lambda: log_normal(33).bfloat16(), 11, False),
        ("float64", lambda: log_normal(33).double() * 1e200, 11, False),
        ("strided", lambda: log_normal(99)[::3], 10, False),
        ("expanded", lambda: torch.ones(1).expand(12), 5, False),
        ("4096", lambda: log_normal(4096), 1229, True),
        ("70001", lambda: log_normal(70001, sigma=2.0), 21000, True),
    ]


def _row_inclusion(weights: Callable[[], Tensor], k: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (weights(), k)


def _draw_winners(weights: Callable[[], Tensor], k: int, value: int, winners: bool) -> Callable[[], tuple[Any, ...]]:
    return lambda: (weights(), k, seed(value), winners)


def _draw_rows(n: int, k: int, value: int, sigma: float = 1.0) -> Callable[[], tuple[Any, ...]]:
    return lambda: (inclusion(n, k, sigma), k, seed(value))


def _gather(x: Callable[[], Tensor], k: int, scaled: bool) -> Callable[[], tuple[Any, ...]]:
    def make() -> tuple[Any, ...]:
        values = x()
        return values, row_indices(values.shape[0], k), scales(k) if scaled else None

    return make


def _matmul(n: int, k: int, d: int, o: int, dtype: torch.dtype) -> Callable[[], tuple[Any, ...]]:
    return lambda: (matrix(n, o, dtype), matrix(k, d, dtype, value=5), row_indices(n, k), scales(k))


def _integer_cases() -> list[OpCase]:
    cases = []
    for name, weights, k, large in _weights_cases():
        cases.append(OpCase("row_inclusion", name, _row_inclusion(weights, k), large=large))
        for winners in (False, True):
            estimator = "wta_crs" if winners else "crs"
            make = _draw_winners(weights, k, 2**40 + k, winners)
            cases.append(OpCase("draw_winners", f"{estimator}_{name}", make, large=large))
    for n, k, value, sigma in [
        (2, 1, 0, 1.0),
        (33, 11, 2**63 - 1, 1.0),
        (64, 63, 7, 1.0),
        (100, 1, 8, 1.0),
        (128, 40, 2**32 + 5, 4.0),
        (4096, 1229, 9, 1.0),
        (70001, 21000, 2**62 + 3, 2.0),
    ]:
        cases.append(OpCase("draw_rows", f"{n}x{k}", _draw_rows(n, k, value, sigma), large=n > 128))

    def strided() -> tuple[Any, ...]:
        return torch.stack([inclusion(50, 20)] * 2, 1)[:, 0], 20, seed(3)

    cases.append(OpCase("draw_rows", "strided", strided))
    return cases


def _transposed(dtype: torch.dtype) -> Tensor:
    return matrix(24, 40, dtype).t()


def _column_slice(dtype: torch.dtype) -> Tensor:
    return matrix(30, 48, dtype)[:, 5:26]


def _gather_cases() -> list[OpCase]:
    cases = []
    for dtype in FLOATS:
        for scaled in (False, True):
            inputs: dict[str, tuple[Callable[[], Tensor], int]] = {
                "odd": (partial(matrix, 37, 19, dtype), 11),
                "wide": (partial(matrix, 20, 128, dtype), 20),
                "transposed": (partial(_transposed, dtype), 13),
                "column_slice": (partial(_column_slice, dtype), 9),
                "no_rows_kept": (partial(matrix, 6, 5, dtype), 0),
                "no_features": (partial(matrix, 6, 0, dtype), 3),
            }
            for name, (x, k) in inputs.items():
                full_name = f"{name}_{short(dtype)}{'_scaled' if scaled else ''}"
                cases.append(OpCase("gather_rows", full_name, _gather(x, k, scaled)))
    not_finite = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0], [-float("inf"), 6e4]])
    extremes = torch.tensor([[6.5e4, 3e38], [1e-8, 1e-45], [6e-8, -0.0]])
    for dtype in FLOATS:
        for name, values in (("not_finite", not_finite), ("extremes", extremes)):
            cases.append(OpCase("gather_rows", f"{name}_{short(dtype)}", _gather(partial(values.to, dtype), 3, True)))

    def repeated() -> tuple[Any, ...]:
        return matrix(5, 8), torch.tensor([4, 4, 0, 4], dtype=torch.int32), scales(4)

    def expanded() -> tuple[Any, ...]:
        return matrix(1, 8).expand(6, 8), row_indices(6, 4), scales(4)

    cases.append(OpCase("gather_rows", "repeated_rows", repeated))
    cases.append(OpCase("gather_rows", "expanded", expanded))
    for dtype in FLOATS:
        make = _gather(partial(matrix, 2000, 257, dtype), 600, True)
        cases.append(OpCase("gather_rows", f"many_{short(dtype)}", make, large=True))
    return cases


def _matmul_cases() -> list[OpCase]:
    cases = []
    shapes = {  # N, k, D, O
        "odd": (37, 11, 19, 23),
        "even": (128, 64, 64, 96),
        "one_row_kept": (50, 1, 7, 1),
        "all_rows_kept": (20, 20, 33, 16),
        "no_rows_kept": (6, 0, 5, 4),
        "no_inputs": (6, 3, 0, 4),
        "no_outputs": (6, 3, 5, 0),
    }
    for dtype in FLOATS:
        for name, sizes in shapes.items():
            cases.append(OpCase("sampled_matmul", f"{name}_{short(dtype)}", _matmul(*sizes, dtype), exact=False))
        make = _matmul(1500, 450, 130, 70, dtype)
        cases.append(OpCase("sampled_matmul", f"many_{short(dtype)}", make, exact=False, large=True))

    def transposed() -> tuple[Any, ...]:
        return matrix(24, 40).t(), matrix(17, 26)[:, 2:20], row_indices(40, 17), scales(17)

    def repeated() -> tuple[Any, ...]:
        rows = torch.tensor([7, 7, 0, 7], dtype=torch.int32)
        return matrix(8, 6), matrix(4, 5, value=5), rows, scales(4)

    cases.append(OpCase("sampled_matmul", "transposed", transposed, exact=False))
    cases.append(OpCase("sampled_matmul", "repeated_rows", repeated, exact=False))
    return cases


def _like(dtype: torch.dtype) -> tuple[Any, ...]:
    return (matrix(3, 2, dtype),)


def _seed_cases() -> list[OpCase]:
    return [OpCase("new_seed", short(dtype), partial(_like, dtype)) for dtype in FLOATS]


CASES: list[OpCase] = [*_seed_cases(), *_integer_cases(), *_gather_cases(), *_matmul_cases()]


def cases_of(*ops: str, large: bool | None = None) -> list[OpCase]:
    """The rows of the named ops; `large=False` leaves out what is too big for an interpreter."""
    return [case for case in CASES if case.op in ops and large in (None, case.large)]


def oracle(op: str, args: tuple[Any, ...]) -> Tensor:
    """The op in float64, for the ops that round."""
    if op == "gather_rows":
        x, rows, scale = args
        return x.double()[rows.long()] * (1.0 if scale is None else scale.double()[:, None])
    dy, kept, rows, scale = args
    return torch.einsum("ko,kd,k->od", dy.double()[rows.long()], kept.double(), scale.double())


def plain(op: str, args: tuple[Any, ...]) -> Tensor:
    """The op as one would write it in plain PyTorch in the dtype of its inputs, whose error sets the budget."""
    if op == "gather_rows":
        x, rows, scale = args
        kept = x[rows.long()]
        return kept if scale is None else (kept * scale[:, None]).to(x.dtype)
    dy, kept, rows, scale = args
    return (dy[rows.long()] * scale[:, None]).to(dy.dtype).t() @ kept


def assert_within_budget(actual: Tensor, op: str, args: tuple[Any, ...]) -> None:
    """Largest error against float64 at most twice that of plain PyTorch, or of one rounding where that has none."""
    exact = oracle(op, args)
    assert actual.shape == exact.shape and actual.dtype == args[0].dtype
    if not exact.numel():
        return
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    budget = 2 * max((plain(op, args).double() - exact).abs().max().item(), rounding.item())
    error = (actual.double() - exact).abs().max().item()
    assert error <= budget, f"{op}: error {error:.3g} against float64, budget {budget:.3g}"


def assert_same(actual: Any, expected: Any) -> None:
    """Same dtype, shape and bits, NaN equal to NaN."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.signbit(actual.cpu().nan_to_num()), torch.signbit(expected.cpu().nan_to_num()))
