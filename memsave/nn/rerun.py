"""What linears do in a forward that is run again in backward: draw rows for their weight gradients, skip products.

x is (N, D); dy (N, O); rows (k,) int32; scale (k,) fp32. dW = dy^T x is a sum over rows of outer products. In backward
both factors are known, so row i is drawn with a probability proportional to |x_i| |dy_i|: of all the unbiased
estimators of this kind, the one of least variance (Drineas et al. 2006). It keeps nothing between forward and backward
but a seed; what it saves is the part of the matrix product that belongs to the other rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .matrix import as_matrix, row_norms
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
        norms = [row_norms(as_matrix(dy)) for dy in dys if dy is not None]
        self._norms = torch.stack(norms).norm(dim=0) if norms else None  # (N,)

    def weight_grad(self, dy: Tensor, x: Tensor) -> Tensor:
        """An unbiased estimate (O, D) of dy^T x; the product itself where that takes no more rows."""
        if not 0 < self._keep.num_rows(x.shape[0]) < x.shape[0]:
            return dy.t() @ x
        if self._sample is None:
            factors = row_norms(dy) if self._norms is None else self._norms
            rows, scale = self._keep.draw(x, self._seed, factors)
            self._sample = rows, scale, ops.gather_rows(x, rows, None), poison(x).to(x.dtype)
        rows, scale, kept, poisoned = self._sample
        dweight = ops.sampled_matmul(dy, kept, rows, scale)
        dweight += poison(dy).to(dweight.dtype)[:, None]
        dweight += poisoned
        return dweight


class Rerun(NamedTuple):
    """A forward that is run again.

    Attributes:
        draws: for each linear that draws, its draw.
        unread: the linear whose output nobody reads: it is there to be differentiated only.
    """

    draws: Mapping[nn.Module, BackwardDraw]
    unread: nn.Module | None


# Local to a thread: on a GPU, backward and the forwards that it runs again are in a thread of their own.
_now = threading.local()


@contextmanager
def rerunning(rerun: Rerun) -> Iterator[None]:
    """Within it, the linears named in `rerun` do what it says."""
    before = getattr(_now, "rerun", None)
    _now.rerun = rerun
    try:
        yield
    finally:
        _now.rerun = before


def asked_of(linear: nn.Module) -> tuple[BackwardDraw | None, bool]:
    """The draw that `linear`, called now, must record, or None; and whether nobody reads its output."""
    rerun: Rerun | None = getattr(_now, "rerun", None)
    return (None, False) if rerun is None else (rerun.draws.get(linear), rerun.unread is linear)
