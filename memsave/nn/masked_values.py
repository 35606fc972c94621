"""Gradients of the masked entries of a linear's weight, without the weight's dense gradient (SHiRA, arXiv 2406.13175).

x is (..., D), N rows; y = x W^T (+ b) is (..., O), made by the linear itself; `indices` (K,) int32, ascending, are flat
positions in W as it is stored, (O, D), or (D, O) for Conv1D ("transposed"); `values` (K,) are what is added there.

The linear's own forward gives y; it reads a frozen weight that already holds the values. What is here passes y on and
brings the gradient of the values, one dot product of two columns for each: dv_j = sum over rows n of dy[n, r_j] *
x[n, c_j]. So nothing reads a parameter of another module, and of x is kept what the one linear of memsave would keep:
itself, or nothing beside a note, or sampled rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from . import note as notes
from .eager import no_autocast, once_differentiable
from .matrix import as_matrix, in_shape
from .note import Recipe
from .rows import KeepRows, Sample, draw_sample, poison, sample_of


class Masked(NamedTuple):
    """What is trained of a weight.

    Attributes:
        indices: (K,) int32, flat positions in the weight as it is stored.
        transposed: whether the weight is stored as (D, O).
        scaling: what the values are multiplied by before they are added.
        unchanged: raises where the weight holds other values than in forward; called in backward.
    """

    indices: Tensor
    transposed: bool
    scaling: float
    unchanged: Callable[[], None] | None = None


def with_gradient_of_values(
    reader: nn.Module, x: Tensor, y: Tensor, values: Tensor, masked: Masked, keep: KeepRows | None, seed: Tensor | None
) -> Tensor:
    """y, and in backward the gradient of `values`.

    Args:
        reader: the module that asks, for the sake of siblings that share one sample of x.
        x: (..., D), what the linear read; y: (..., O), what it gave.
        keep: which rows of x to keep; None for all of them.
        seed: 0-d, drawn by the caller in every training forward; needed with `keep`.
    """
    if torch.compiler.is_compiling():
        if keep is None or seed is None:
            return _MaskedValues.apply(y, values, masked, _Shared(0), masked.indices, x.detach())
        settings = (keep.keep_ratio, keep.min_rows, keep.estimator)
        return _sampled_values(y, values, x, masked.indices, masked.transposed, masked.scaling, seed, *settings)
    note = notes.find(x)
    sample = None
    if keep is not None and seed is not None:
        sample = sample_of(id(reader), x, keep, seed, y.dtype, noted=note is not None)
    elif note is not None:
        note.recipe.readers += 1
    sampled = (sample.tensors if sample else None) or ()
    kept = (*sampled, *(note.tensors if note else () if sampled else (x.detach(),)))
    recipe = note.recipe if note else None
    shared = _Shared(len(sampled), recipe, weakref.ref(sample) if sample else None)
    return _MaskedValues.apply(y, values, masked, shared, masked.indices, *kept)


class _Shared(NamedTuple):
    """How many of the kept tensors are the sample's, and what siblings share; none of it holds a tensor of forward."""

    num_sampled: int
    recipe: Recipe | None = None
    sample: weakref.ref[Sample] | None = None


class _MaskedValues(torch.autograd.Function):
    """Keeps of x what `kept` is: the sample's tensors first (rows, scale, poison and, without a note, the kept rows),
    then the note's, or x where there is neither."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, values: Tensor, masked: Masked, shared: _Shared, indices: Tensor, *kept: Tensor
    ) -> Tensor:
        ctx.shared, ctx.masked = shared, masked._replace(indices=None)  # type: ignore[arg-type]
        ctx.dtype = values.dtype
        ctx.save_for_backward(indices, *kept)
        return y.detach()  # the same memory, and no view: it may be modified in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        indices, *kept = ctx.saved_tensors
        if ctx.masked.unchanged is not None:
            ctx.masked.unchanged()
        dvalues = None
        if ctx.needs_input_grad[1]:
            masked = ctx.masked._replace(indices=indices)
            with no_autocast(dy):
                dvalues = _values_grad(as_matrix(dy), masked, ctx.shared, kept).to(ctx.dtype)
        return dy, dvalues, None, None, None, *(None for _ in kept)


@torch.compiler.allow_in_graph  # dynamo cannot trace a Function that saves tensors of a computed size; AOT autograd can
def _sampled_values(
    y: Tensor, values: Tensor, x: Tensor, indices: Tensor, transposed: bool, scaling: float, seed: Tensor, *keep: Any
) -> Tensor:
    """`with_gradient_of_values` from sampled rows under a compiler: no notes, no siblings."""
    with torch.no_grad():
        sample = draw_sample(as_matrix(x.detach()), KeepRows(*keep), seed, y.dtype)
    return _MaskedValues.apply(y, values, Masked(indices, transposed, scaling), _Shared(len(sample)), indices, *sample)


def _values_grad(dy: Tensor, masked: Masked, shared: _Shared, tensors: list[Tensor]) -> Tensor:
    """(K,) from dy (N, O) and the tensors that were kept."""
    num_sampled, recipe, sample = shared
    sampled, noted = tensors[:num_sampled], tensors[num_sampled:]
    if not sampled:
        x = as_matrix(noted[0] if recipe is None else recipe.output(noted)).to(dy.dtype)  # (N, D)
        grad = _products(dy, x, masked)
    else:
        rows, scale, poisoned, *stored = sampled
        if sample is not None and (drawn := sample()) is not None:
            drawn.release()
        kept = stored[0] if recipe is None else recipe.output_rows(noted, rows).to(dy.dtype)  # (k, D)
        grad = _products(ops.gather_rows(dy, rows, scale), kept, masked)
        # Columns that are not finite show in the sampled gradient wherever they would in the full one.
        width = dy.shape[1] if masked.transposed else kept.shape[1]
        row, column = torch.div(masked.indices, width, rounding_mode="floor"), masked.indices % width
        outer, inner = (column, row) if masked.transposed else (row, column)
        grad = grad + poison(dy).to(grad.dtype)[outer] + poisoned.to(grad.dtype)[inner]
    return grad if masked.scaling == 1.0 else grad * masked.scaling


def _products(dy: Tensor, x: Tensor, masked: Masked) -> Tensor:
    a, b = (x, dy) if masked.transposed else (dy, x)
    return ops.sddmm(a, b, masked.indices)


def sparse_linear(x: Tensor, values: Tensor, masked: Masked, features: tuple[int, int]) -> Tensor:
    """x S^T for the sparse S that has `values` at the masked positions; the values get no gradient here.

    Args:
        x: (..., D); values: (K,) of a floating dtype.
        features: (D, O).

    Returns:
        (..., O) in the dtype of x.
    """
    return _SparseLinear.apply(x, values.detach(), masked, features, masked.indices)


class _SparseLinear(torch.autograd.Function):
    """Keeps the values and the indices alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, masked: Masked, features: tuple[int, int], indices: Tensor
    ) -> Tensor:
        ctx.masked, ctx.features = masked._replace(indices=None), features  # type: ignore[arg-type]
        ctx.save_for_backward(values, indices)
        y = _sparse_product(as_matrix(x), values, masked, features, backward=False)
        return in_shape(y, torch.Size((*x.shape[:-1], features[1])))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, indices = ctx.saved_tensors
        dx = _sparse_product(as_matrix(dy), values, ctx.masked._replace(indices=indices), ctx.features, backward=True)
        return in_shape(dx, torch.Size((*dy.shape[:-1], ctx.features[0]))), None, None, None, None


def _sparse_product(x: Tensor, values: Tensor, masked: Masked, features: tuple[int, int], *, backward: bool) -> Tensor:
    """(N, O) = x S^T for x (N, D), or backward (N, D) = x S for x (N, O)."""
    inputs, outputs = features
    rows, columns = (inputs, outputs) if masked.transposed else (outputs, inputs)
    return ops.spmm(x, values * masked.scaling, masked.indices, rows, columns, masked.transposed == backward)
