"""Draws exactly k rows without replacement, each with its given probability.

N rows, k kept rows. Systematic sampling over a random permutation: the rows, in random order, lie on a line, each as
long as its probability; k marks one unit apart, with a random offset, hit k different rows.
Source: Madow, "On the theory of systematic sampling II", 1949; Hartley and Rao, 1962.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "draw_rows(Tensor q, SymInt k, Tensor seed) -> Tensor",
    fake=lambda q, k, seed: q.new_empty((k,), dtype=torch.int32),
    reference=reference,
    kernels=("native", "triton"),
)


def draw_rows(q: Tensor, k: int, seed: Tensor) -> Tensor:
    """k different rows; row i is among them with probability exactly q_i / 2^32. A pure function of its arguments.

    A sum over all rows is estimated without bias by the sum over the drawn rows with weights 2^32 / q
    (Horvitz-Thompson).

    Args:
        q: (N,) int64 in [0, 2^32] with sum k * 2^32, as `row_inclusion` gives for the same k; not checked, except that
            a sum too small for k marks is refused on the CPU.
        k: number of rows, 1 <= k < N.
        seed: 0-d int64, from `new_seed`.

    Returns:
        (k,) int32, ascending.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, k outside [1, N - 1].
    """
    _check.typed("q", q, torch.int64, 1)
    _check.typed("seed", seed, torch.int64, 0)
    _check.kept_rows(k, q.shape[0])
    _check.same_device(q=q, seed=seed)
    return _op(q, k, seed)
