"""Sampled rows: keep k of the N rows of a linear's input, so that their weighted sum estimates the weight gradient.

x is (N, D); rows (k,) int32, ascending; scale (k,) fp32; kept (k, D) = x[rows]. For any dy (N, O), E[sum_r scale_r *
dy[rows_r]^T kept_r] = dy^T x: each row is drawn with a probability that grows with its norm, and weighs one over that
probability. Sources: CRS (Drineas et al. 2006), WTA-CRS (Liu et al. 2023, arXiv 2305.15265); `pps` is fixed-size
sampling without replacement with probabilities proportional to size and Horvitz-Thompson weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from .grad_norms import Visit
from .matrix import row_norms
from .note import Held, HookMark, whole

ESTIMATORS = ("pps", "wta_crs", "crs")
GRAD_NORMS = ("none", "sample_cache")


@dataclass(frozen=True)
class KeepRows:
    """How many rows to keep, and how to choose them.

    Args:
        keep_ratio: k = floor(keep_ratio * N), in (0, 1].
        min_rows: k is never below this (nor above N).
        estimator: one of `ESTIMATORS`.
        grad_norms: one of `GRAD_NORMS`: what is known of the rows of dy when x is drawn from (see `grad_norms.py`).
    """

    keep_ratio: float
    min_rows: int
    estimator: str
    grad_norms: str = "none"

    def num_rows(self, n: int) -> int:
        """k for n rows."""
        # The small addend undoes rounding: 0.29 * 100 is 28.999999999999996.
        return min(n, max(self.min_rows, int(self.keep_ratio * n + 1e-9)))

    def draw(self, x: Tensor, seed: Tensor, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw k rows of x (N, D) by `seed`: rows (k,) and scale (k,). k must be below N.

        `factors` (N,), all positive, multiply the norms of the rows.
        """
        k = self.num_rows(x.shape[0])
        weights = row_norms(x)  # (N,)
        if factors is not None:
            weights = weights * factors
        if self.estimator == "pps":
            inclusion = ops.row_inclusion(weights, k)
            rows = ops.draw_rows(inclusion, k, seed)
            return rows, 2.0**32 / inclusion.index_select(0, rows).to(torch.float32)
        return ops.draw_winners(weights, k, seed, self.estimator == "wta_crs")


def poison(x: Tensor) -> Tensor:
    """(D,): NaN for every column of x (N, D) that holds a NaN or an infinity, else 0.

    A gradient that is sampled must still be non-finite where the full one is: loss scalers and NaN checks depend on it.
    No host sync. A column whose fp32 sum overflows counts as infinite.
    """
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) * 0.0


def draw_sample(
    x: Tensor,
    keep: KeepRows,
    seed: Tensor,
    dtype: torch.dtype,
    *,
    noted: bool = False,
    factors: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Draw rows of x (N, D), which needs no gradient here: what is kept of it for backward.

    Args:
        dtype: the dtype in which the kept rows are multiplied.
        noted: whether a note can recompute the rows, so that none are copied.
        factors: (N,), see `KeepRows.draw`.

    Returns:
        rows (k,) int32, scale (k,) fp32, the poison (D,) and, unless `noted`, the rows themselves (k, D).
    """
    rows, scale = keep.draw(x, seed, factors)
    small = (rows, scale, poison(x).to(dtype))
    return small if noted else (*small, ops.gather_rows(x, rows, None).to(dtype))


class Sample:
    """One draw of rows, shared by all the linears that read the same tensor object in one forward.

    Attributes:
        tensors: what `draw_sample` gave; None once it is released.
        readers: ids of the linears that have used it. One that comes back runs another forward, and draws anew.
        visit: where all the readers' backwards leave the norms of dy; the first reader's.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], made_under: HookMark, key: tuple[object, ...], visit: Visit | None
    ) -> None:
        self.tensors: tuple[Tensor, ...] | None = tensors
        self.visit = visit
        self.readers: set[int] = set()
        self._made_under = made_under
        self._key = key

    def serves(self, reader: int, key: tuple[object, ...]) -> bool:
        """Whether this linear may use it, under the conditions in `key`."""
        fresh = self.tensors is not None and reader not in self.readers
        return fresh and self._key == key and self._made_under.is_on_top()

    def release(self) -> None:
        """Forget the tensors: a reader's backward has begun, so every reader has saved them by now."""
        self.tensors = None


_samples: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_held = Held(1)


def sample_of(
    reader: int,
    x: Tensor,
    keep: KeepRows,
    seed: Tensor,
    dtype: torch.dtype,
    *,
    noted: bool,
    visit: Visit | None = None,
) -> Sample:
    """The sample of the tensor object x (..., D): a sibling's from the same conditions, or a new one by `seed`."""
    x = whole(x)
    key = (keep, dtype, noted, x._version, visit.block if visit else None)
    sample: Sample | None = _samples.get(x)
    if sample is None or not sample.serves(reader, key):
        with torch.no_grad():
            rows, factors = x.detach().reshape(-1, x.shape[-1]), visit.factors(x.device) if visit else None
            tensors = draw_sample(rows, keep, seed, dtype, noted=noted, factors=factors)
        sample = _samples[x] = Sample(tensors, HookMark(), key, visit)
        _held.add(sample)
    sample.readers.add(reader)
    return sample


def kept_bytes(input_shape: tuple[int, ...], dtype: torch.dtype, keep: KeepRows | None, *, noted: bool) -> int:
    """Bytes that are kept of the input of a linear whose weight, or a part of it, is trained.

    Whole input: N * D elements, or none with a note. Sampled: 8 bytes (index and scale) for each of k rows, D elements
    (the poison), and k * D elements, which a note saves.
    """
    *leading, features = input_shape
    num_rows = prod(leading)
    if keep is None:
        return 0 if noted else num_rows * features * dtype.itemsize
    k = keep.num_rows(num_rows)
    return k * 8 + (1 if noted else k + 1) * features * dtype.itemsize
