"""A and B of a LaMDA adapter from the SVD of a weight, the same at every run: seeded, on the CPU, signs fixed.

M = W^T (D, O) = U Sigma V^T, whatever the layer stores. A = U_r (D, r): the top singular vectors on the input side;
B = V_r^T (r, O): on the output side. Source: LaMDA, arXiv 2406.12832.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .config import LaMDAConfig


class Factors(NamedTuple):
    """A (D, r) and B (r, O) with orthonormal columns and rows, and sigma (r,), in float32 (or float64), on the CPU."""

    a: Tensor
    b: Tensor
    sigma: Tensor


_postponed: list[bool] = []


@contextmanager
def postponed() -> Iterator[None]:
    """Within it nothing is decomposed: the factors are zeros, for layers whose base weights are loaded afterwards.

    Fake weights, which have no values, are never decomposed.
    """
    _postponed.append(True)
    try:
        yield
    finally:
        _postponed.pop()


@torch.no_grad()
def decompose(matrix: Tensor, rank: int, config: LaMDAConfig) -> Factors:
    """The top `rank` singular vectors of M (D, O) by the recipe in `config`; torch's random state is left as it was.

    The entry of largest magnitude of each column of A is positive, which fixes the signs.
    """
    if _postponed or isinstance(matrix, FakeTensor):
        shapes = (matrix.shape[0], rank), (rank, matrix.shape[1]), (rank,)
        return Factors(*(torch.zeros(shape, device="cpu") for shape in shapes))
    m = _on_cpu(matrix)
    if config.svd == "exact":
        u, sigma, vt = torch.linalg.svd(m, full_matrices=False)
        v = vt.t()
    else:
        u, sigma, v = _randomized(m, rank, config)
    a, b = u[:, :rank], v[:, :rank].t()
    largest = a.gather(0, a.abs().argmax(0, keepdim=True))[0]  # (r,)
    sign = torch.where(largest < 0, -1.0, 1.0).to(a.dtype)
    return Factors((a * sign).contiguous(), (b * sign[:, None]).contiguous(), sigma[:rank].contiguous())


@torch.no_grad()
def energy(matrix: Tensor, rank: int, config: LaMDAConfig) -> float:
    """Share of ||M||_F^2 in the top `rank` singular values of M (D, O), in [0, 1]; 1 for zeros and for fake weights."""
    if isinstance(matrix, FakeTensor):
        return 1.0
    m = _on_cpu(matrix)
    total = float(torch.linalg.vector_norm(m, dtype=torch.float64)) ** 2
    if total == 0:
        return 1.0
    sigma = torch.linalg.svdvals(m) if config.svd == "exact" else _randomized(m, rank, config)[1]
    return min(float(sigma[:rank].double().square().sum()) / total, 1.0)


def _on_cpu(matrix: Tensor) -> Tensor:
    """In float32 or float64, on the CPU, so that the result does not depend on the device."""
    return matrix.detach().to(device="cpu", dtype=torch.promote_types(matrix.dtype, torch.float32))


def _randomized(m: Tensor, rank: int, config: LaMDAConfig) -> tuple[Tensor, Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return torch.svd_lowrank(m, q=min(rank + config.oversample, *m.shape), niter=config.niter)
