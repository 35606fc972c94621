"""Values for the rows of the case table, on the CPU and from fixed seeds.

N rows, D features, k kept rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALF, torch.float64)


def generator(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def seed(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


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


def mask(n: int, d: int, kept: float = 0.6, value: int = 4) -> Tensor:
    """(n, d) bool."""
    return torch.rand(n, d, generator=generator(value)) < kept


def packed(n: int, d: int, kept: float = 0.6) -> Tensor:
    """(n, ceil(d / 8)) uint8: the bits of `mask`, by numpy."""
    return torch.from_numpy(np.packbits(mask(n, d, kept).numpy(), axis=-1, bitorder="little"))


def strided(tensor: Tensor) -> Tensor:
    """The same values with a gap behind each along the last dimension."""
    return torch.stack([tensor, tensor.flip(-1)], -1)[..., 0]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def far_rows(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (2^24 + 9, 1), zero but for its last rows, and rows (4,), of which float32 cannot hold the last three."""
    first = 2**24
    x = torch.zeros(first + 9, 1, dtype=dtype)
    x[first:, 0] = torch.arange(1, 10)
    return x, torch.tensor([first, first + 1, first + 3, first + 7], dtype=torch.int32)


def weights() -> list[tuple[str, Callable[[], Tensor], int, bool]]:
    """(name, weights (N,), k, large): what `row_inclusion` and `draw_winners` are called with."""
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
