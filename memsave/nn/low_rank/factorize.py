"""The best low-rank factors of a weight: W (O, D) ~ second (O, R) @ first (R, D), and the spectrum that tells how good.

Plain, W_r = U_r U_r^T W with U_r the top R left singular vectors minimizes ||W - W_r||_F, and the error is the root of
the sum of the squares of the other singular values (Eckart and Young, 1936).

Whitened, it minimizes ||(W - W_r) C^(1/2)||_F, the error of the outputs, where C (D, D) is the sum of x x^T over inputs
x (SVD-LLM, arXiv 2403.07378; for FlashSVD, arXiv 2508.01506). C^(1/2) is not needed: the columns of W_r C^(1/2) lie in
the span of the top R left singular vectors of W C^(1/2), which are the top R eigenvectors U_r of W C W^T. So
W_r = U_r U_r^T W again, without an inverse.

C gets d = damping * mean(diag C) on its diagonal: directions that no input had still count, and C may be singular.
On the inputs themselves the whitened factors are never worse than the plain ones, whatever d is. Proof: let
e_C(A) = ||(W - A) C^(1/2)||_F^2, and w and p the whitened and the plain approximations of one rank. w is the best for
C + d I, and e_(C + d I) = e_C + d e_I, so e_C(w) + d e_I(w) <= e_C(p) + d e_I(p). p is the best for I, so
e_I(p) <= e_I(w). Hence e_C(w) <= e_C(p).

All comes from eigenvectors of a Gram matrix of the smaller side n = min(O, D), in float64: several times quicker than
an SVD in float32, and as accurate in all but singular values below 1e-8 of the largest, which are noise. W and C are
turned to float64 in blocks, so that beside the factors only a few (n, n) and (n, 1024) matrices are held.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_BLOCK = 1024  # columns that are float64 at once


class Factors(NamedTuple):
    """W ~ second @ first, component by component, the most important first.

    Column i of `second` and row i of `first` have one norm (up to rounding); the row's entry of largest magnitude is
    positive. The first r components are the factors of rank r, up to rounding.
    """

    second: Tensor
    first: Tensor


def factorize(weight: Tensor, rank: int, *, moment: Tensor | None = None, damping: float = 1e-6) -> Factors:
    """The best factors of `weight` of one rank; torch's random state is not touched.

    Args:
        weight: (O, D), floating-point, any strides. A fake or meta weight gives zeros.
        rank: R, from 1 to min(O, D). With min(O, D) the product is W, up to rounding.
        moment: C (D, D), symmetric, float32 or float64, on any device; None for the plain factors.
        damping: d / mean(diag C), at least 0; see above.

    Returns:
        second (O, R) and first (R, D) on the device of the weight, in float32, or float64 for a float64 weight.

    Raises:
        ValueError: an argument is not as described, or an entry is not finite.
    """
    second, first = factorize_heads(weight, rank, 1, moment=moment, damping=damping)
    return Factors(second[0], first)


@torch.no_grad()
def factorize_heads(
    weight: Tensor, rank: int, heads: int, *, moment: Tensor | None = None, damping: float = 1e-6
) -> Factors:
    """The best factors of each of `heads` equal blocks of rows of `weight`, as if `factorize` were called on each.

    Args:
        weight, moment, damping: as of `factorize`; O a multiple of `heads`.
        rank: R of each block, from 1 to min(O / heads, D).

    Returns:
        second (heads, O / heads, R) and first (heads * R, D), where head h has rows h * R to (h + 1) * R. Device and
        dtype as of `factorize`.

    Raises:
        ValueError: as `factorize`.
    """
    _check(weight, moment, damping, heads)
    size, features = weight.shape[0] // heads, weight.shape[1]
    if not 1 <= rank <= min(size, features):
        shape = f"({size}, {features})" + (f" of each of {heads} heads" if heads > 1 else "")
        raise ValueError(f"rank: expected 1 to {min(size, features)} for a weight of shape {shape}, got {rank}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if _has_no_values(weight, moment):
        shapes = (heads, size, rank), (heads * rank, features)
        return Factors(*(weight.new_zeros(shape, dtype=dtype) for shape in shapes))
    w = _where_float64_is(weight).unflatten(0, (heads, size))  # (H, O / H, D)
    metric = _metric(moment, damping, w)
    if size <= features:
        second, first = _wide(w, rank, metric, dtype)
    elif metric is None:
        second, first = (factor.mT for factor in reversed(_wide(w.mT, rank, None, dtype)))
    else:
        second, first = _tall(w, rank, metric, dtype)
    peak = first.gather(2, first.abs().argmax(2, keepdim=True))  # (H, R, 1)
    sign = torch.where(peak < 0, -1.0, 1.0).to(dtype)
    return Factors(
        (second * sign.mT).contiguous().to(weight.device), (first * sign).flatten(0, 1).contiguous().to(weight.device)
    )


@torch.no_grad()
def spectrum(weight: Tensor, *, moment: Tensor | None = None, damping: float = 1e-6) -> Tensor:
    """The singular values of W, or of W (C + d I)^(1/2), descending: what each component of `factorize` holds.

    Args:
        weight, moment, damping: as of `factorize`.

    Returns:
        (min(O, D),) on the device of the weight, in float32, or float64 for a float64 weight. The squares of those from
        R on add up to the squared error at rank R.

    Raises:
        ValueError: as `factorize`.
    """
    _check(weight, moment, damping, 1)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if _has_no_values(weight, moment):
        return weight.new_zeros(min(weight.shape), dtype=dtype)
    w = _where_float64_is(weight)[None]
    metric = _metric(moment, damping, w)
    if weight.shape[0] <= weight.shape[1]:
        gram = _gram(w, metric)
    elif metric is None:
        gram = _gram(w.mT, None)
    else:
        gram = _reduced(w, metric)[0]
    sigma = torch.linalg.eigvalsh(gram)[0].flip(0).clamp_(min=0).sqrt_()
    return sigma.to(device=weight.device, dtype=dtype)


class _Metric(NamedTuple):
    """C + d I."""

    moment: Tensor
    added: float

    def block(self, rows: slice, columns: slice, like: Tensor) -> Tensor:
        """In float64, on the device of `like`. Equal slices or disjoint ones."""
        block = self.moment[rows, columns].to(device=like.device, dtype=torch.float64, copy=True)
        if rows == columns:
            block.diagonal().add_(self.added)
        return block


def _metric(moment: Tensor | None, damping: float, w: Tensor) -> _Metric | None:
    """None without inputs, too: then all directions count alike."""
    if moment is None:
        return None
    moment = _where_float64_is(moment)
    mean = float(moment.diagonal().double().mean())
    return _Metric(moment, damping * mean) if mean > 0 else None


def _wide(w: Tensor, rank: int, metric: _Metric | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (H, n, R) and (H, R, m) of w (H, n, m)."""
    basis = _top(_gram(w, metric), rank)  # (H, n, R)
    first = w.new_empty((w.shape[0], rank, w.shape[2]), dtype=dtype)
    squares = torch.zeros_like(basis[:, 0])  # (H, R)
    for columns in _blocks(w.shape[2]):
        part = basis.mT @ w[:, :, columns].double()
        squares += part.square().sum(2)
        first[:, :, columns] = part
    scale = squares.pow_(0.25)
    first /= torch.where(scale > 0, scale, 1.0).to(dtype)[:, :, None]
    return basis.mul_(scale[:, None, :]).to(dtype), first


def _tall(w: Tensor, rank: int, metric: _Metric, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (H, n, R) and (H, R, m) of w (H, n, m) with n > m: those of the square `triangle` of w = Q triangle."""
    gram, triangle, inverse = _reduced(w, metric)
    basis = _top(gram, rank)  # (H, m, R)
    first = basis.mT @ triangle  # (H, R, m)
    scale = torch.linalg.vector_norm(first, dim=2, keepdim=True).sqrt_()  # (H, R, 1)
    first /= torch.where(scale > 0, scale, 1.0)
    right = inverse @ basis.mul_(scale.mT)  # (H, m, R), Q = w @ inverse
    second = w.new_empty((*w.shape[:2], rank), dtype=dtype)
    for rows in _blocks(w.shape[1]):
        second[:, rows] = w[:, rows].double() @ right
    return second, first.to(dtype)


def _reduced(w: Tensor, metric: _Metric) -> tuple[Tensor, Tensor, Tensor]:
    """For w (H, n, m) with n > m: the Gram matrix of `triangle` in the metric, `triangle` and its inverse, (H, m, m).

    w = Q triangle with Q (H, n, m) = w @ inverse of orthonormal columns, so that the best approximation of w is Q times
    that of `triangle`. It holds whatever was rounded, since only a product with its own inverse comes between; where w
    has no full rank, columns of Q that do not matter are shorter.

    W's columns are scaled first so that every input has one variance: with inputs a million times larger than others,
    their weights would be lost among the others in the eigenvectors of W^T W.
    """
    everything = slice(0, w.shape[2])
    c = metric.block(everything, everything, w)  # (m, m)
    spread = c.diagonal().clamp(min=0).sqrt()
    spread = torch.where(spread > 0, spread, 1.0)
    squares, vectors = torch.linalg.eigh(_gram(w.mT, None) * (spread[:, None] * spread))
    largest = squares[:, -1:]
    squares = squares.clamp_(min=torch.finfo(torch.float64).eps * w.shape[2] * largest)
    sigma = squares.sqrt_()  # (H, m), zeros for a w of zeros only
    whitened = (vectors * sigma[:, None]).mT  # (H, m, m)
    gram = whitened @ (c / (spread[:, None] * spread)) @ whitened.mT
    return gram, whitened / spread, vectors.mul_(spread[:, None]).div_(torch.where(sigma > 0, sigma, 1.0)[:, None])


def _gram(w: Tensor, metric: _Metric | None) -> Tensor:
    """w (C + d I) w^T (H, n, n) of w (H, n, m), or w w^T, in float64."""
    gram = torch.zeros((*w.shape[:2], w.shape[1]), dtype=torch.float64, device=w.device)
    for columns in _blocks(w.shape[2]):
        part = w[:, :, columns].double()
        if metric is None:
            gram.baddbmm_(part, part.mT)
            continue
        # C is symmetric: what lies left of the diagonal blocks is added by the transpose.
        half = (part @ metric.block(columns, columns, w)).mul_(0.5)
        for before in _blocks(columns.start):
            half += w[:, :, before].double() @ metric.block(before, columns, w)
        gram.baddbmm_(half, part.mT)
    return gram if metric is None else gram + gram.mT


def _top(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors (H, n, R) of the largest eigenvalues, descending."""
    return torch.linalg.eigh(gram)[1][:, :, -rank:].flip(2)


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _BLOCK):
        yield slice(start, min(start + _BLOCK, length))


def _where_float64_is(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight.cpu() if weight.device.type == "mps" else weight


def _has_no_values(*tensors: Tensor | None) -> bool:
    return any(isinstance(tensor, FakeTensor) or (tensor is not None and tensor.is_meta) for tensor in tensors)


def _check(weight: Tensor, moment: Tensor | None, damping: float, heads: int) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        got = f"shape {tuple(weight.shape)}, dtype {weight.dtype}"
        raise ValueError(f"weight: expected a floating-point matrix (out_features, in_features), got {got}")
    if heads < 1 or weight.shape[0] % heads:
        raise ValueError(f"heads: expected a divisor of the {weight.shape[0]} rows of the weight, got {heads}")
    if not (isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: expected a finite number of at least 0, got {damping}")
    if moment is not None:
        expected = (weight.shape[1], weight.shape[1])
        if tuple(moment.shape) != expected or moment.dtype not in (torch.float32, torch.float64):
            got = f"shape {tuple(moment.shape)}, dtype {moment.dtype}"
            raise ValueError(f"moment: expected shape {expected}, dtype float32 or float64, got {got}")
    for name, tensor in (("weight", weight), ("moment", moment)):
        if tensor is not None and tensor.numel() and not _has_no_values(tensor):
            least, largest = torch.aminmax(tensor.detach())  # both keep a NaN
            if not (isfinite(float(least)) and isfinite(float(largest))):
                raise ValueError(f"{name}: expected finite entries, got some that are NaN or infinite")
