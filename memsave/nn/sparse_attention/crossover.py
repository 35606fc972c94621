"""From how many keys on sparse attention is faster than torch's own here: both are timed, side by side.

One sequence of T tokens, causal, forward and backward, h heads of D features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .function import attend
from .selecting import Choice, Visibility

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MAX_SECONDS = 2.0
"""A length at which torch's own takes longer is the last one that is tried."""
_REPEATS = 3


class Crossover(NamedTuple):
    """What was found.

    Attributes:
        keys: from how many keys on sparse attention was faster at every length that was tried; one more than was
            tried if it never was.
        seconds: for each length, the best time of dense and of sparse attention.
        heads, head_size: what was timed.
    """

    keys: int
    seconds: dict[int, tuple[float, float]]
    heads: int
    head_size: int

    def describe(self) -> str:
        """What the report says."""
        times = ", ".join(f"{length:,}: {dense / sparse:.2f}x" for length, (dense, sparse) in self.seconds.items())
        if self.keys > max(self.seconds):
            found = f"no length up to {max(self.seconds):,} is faster with sparse attention here, so all calls are "
            found += f"dense below {self.keys:,} keys"
        else:
            found = f"sparse attention from {self.keys:,} keys on, where it is faster here; dense below"
        return (
            f"sparse_mha: {found}. Speed of forward and backward against dense, causal, {self.heads} heads of "
            f"{self.head_size}, by tokens: {times}."
        )


def crossover(
    choice: Choice,
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    lengths: tuple[int, ...] = LENGTHS,
) -> Crossover:
    """Times both at growing lengths; random numbers start where the caller's are, and leave those as they are."""
    seconds: dict[int, tuple[float, float]] = {}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
        for length in lengths:
            seconds[length] = _times(choice, heads, head_size, length, dtype, device)
            if seconds[length][0] > MAX_SECONDS:
                break
    keys = max(seconds) + 1
    for length in reversed(seconds):
        dense, sparse = seconds[length]
        if sparse >= dense:
            break
        keys = length
    return Crossover(keys, seconds, heads, head_size)


def _times(
    choice: Choice, heads: int, head_size: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    shape = (1, heads, length, head_size)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    subspaces = math.gcd(head_size, max(1, head_size // 8))
    codebook = torch.randn(heads, subspaces, 16, head_size // subspaces, device=device)
    see = Visibility(None, True, 0, 0, True)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda: attend(q, k, v, codebook, choice, see),
    )
    best = [math.inf, math.inf]
    for _ in range(_REPEATS):
        for number, way in enumerate(ways):
            _wait(device)
            start = time.perf_counter()
            way().sum().backward()
            _wait(device)
            best[number] = min(best[number], time.perf_counter() - start)
    return best[0], best[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
