"""Rows drawn in backward: the weight gradient of a linear whose whole input is at hand there, from a part of its rows.

x is (N, D); dy (N, O); rows (k,) int32; scale (k,) fp32. dW = dy^T x is a sum over rows of outer products. In backward
both factors are known, so row i is drawn with a probability proportional to |x_i| |dy_i|: of all the unbiased
estimators of this kind, the one of least variance (Drineas et al. 2006). It keeps nothing between forward and backward
but a seed; what it saves is the part of the matrix product that belongs to the other rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .. import ops
from .rows import KeepRows, poison


class BackwardDraw:
    """One draw of rows of one tensor x, for all the linears that read it in one pass.

    Args:
        keep: how many rows, and by which estimator.
        seed: 0-d int64 tensor.
    """

    def __init__(self, keep: KeepRows, seed: Tensor) -> None:
        self._keep = keep
        self._seed = seed
        self._norms: Tensor | None = None
        self._sample: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def expect(self, *dys: Tensor | None) -> None:
        """Take the norms from the gradients (..., O) that all the readers will bring, instead of the first reader's."""
        norms = [_row_norms(dy.reshape(-1, dy.shape[-1])) for dy in dys if dy is not None]
        self._norms = torch.stack(norms).norm(dim=0) if norms else None  # (N,)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """An unbiased estimate (O, D) of dy^T x; the product itself where that takes no more rows."""
        if not 0 < self._keep.num_rows(x.shape[0]) < x.shape[0]:
            return dy.t() @ x
        if self._sample is None:
            factors = _row_norms(dy) if self._norms is None else self._norms
            rows, scale = self._keep.draw(x, self._seed, factors)
            self._sample = rows, scale, ops.gather_rows(x, rows, None), poison(x).to(x.dtype)
        rows, scale, kept, poisoned = self._sample
        dweight = ops.sampled_matmul(dy, kept, rows, scale)
        dweight += poison(dy).to(dweight.dtype)[:, None]
        dweight += poisoned
        return dweight


def _row_norms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=1, dtype=torch.promote_types(t.dtype, torch.float32))


# Local to a thread: on a GPU, backward and the forwards that it runs again are in a thread of their own.
_now = threading.local()


@contextmanager
def drawing(draws: Mapping[nn.Module, BackwardDraw]) -> Iterator[None]:
    """Within it, these linears record that their weight gradients come from these draws."""
    before = getattr(_now, "draws", {})
    _now.draws = draws
    try:
        yield
    finally:
        _now.draws = before


def draw_of(linear: nn.Module) -> BackwardDraw | None:
    """The draw that `linear`, called now, must record, or None."""
    draws: Mapping[nn.Module, BackwardDraw] = getattr(_now, "draws", {})
    return draws.get(linear)
