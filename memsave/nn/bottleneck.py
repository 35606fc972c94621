"""What a bottleneck adds to the output of a linear: y + alpha * ((x A) S) B, keeping x A alone.

x is (..., D), N rows; y (..., O); A (D, r), frozen; S (r, r); B (r, O), held as segments of rows, each frozen or not.
All products run in the dtype of y, which is autocast's where it applies; A, S and B are cast to it where they differ
and their gradients come back in their own dtype, so that float32 adapters of a bfloat16 model are master weights.

Kept for backward: h = x A (N, r) in the dtype of y, if S or any segment needs a gradient, and A, S and B themselves.
With g = dy B^T: dS = alpha h^T g, dB = (alpha h S)^T dy of the segments that train, dx = alpha g S^T A^T.
Source: LaMDA, arXiv 2406.12832.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .eager import no_autocast, once_differentiable
from .matrix import as_matrix, in_shape


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, a: Tensor, s: Tensor, alpha: float, in_place: bool, *segments: Tensor
    ) -> Tensor:
        with no_autocast(y):
            h = as_matrix(x).to(y.dtype) @ a.to(y.dtype)  # (N, r)
            scaled = h @ (alpha * s).to(y.dtype)
            b = _rows(segments, y.dtype)
            flat = as_matrix(y)
            # Not marked dirty: y may be a view (of the output of addmm), and nobody looks at it again.
            out = in_shape(flat.addmm_(scaled, b) if in_place else torch.addmm(flat, scaled, b), y.shape)
        ctx.alpha, ctx.x_shape, ctx.x_dtype = alpha, x.shape, x.dtype
        needs_h = ctx.needs_input_grad[3] or any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(h if needs_h else None, a if ctx.needs_input_grad[1] else None, s, *segments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, a, s, *segments = ctx.saved_tensors
        needs_y, needs_x, _, needs_s, _, _, *needs_b = ctx.needs_input_grad
        flat, alpha, dtype = as_matrix(dy), ctx.alpha, dy.dtype  # (N, O)
        dx = ds = None
        db: Sequence[Tensor | None] = [None] * len(segments)
        with no_autocast(dy):
            scaled_s = (alpha * s).to(dtype)
            if needs_x or needs_s:
                g = flat @ _rows(segments, dtype).t()  # (N, r)
                if needs_s:
                    ds = (h.t() @ g).to(s.dtype) * alpha
                if needs_x:
                    dx = ((g @ scaled_s.t()) @ a.to(dtype).t()).to(ctx.x_dtype).view(ctx.x_shape)
            if any(needs_b):
                db = _segment_grads(h @ scaled_s, flat, segments, needs_b)
        return (dy if needs_y else None, dx, None, ds, None, None, *db)


def _rows(segments: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """B (r, O) in one piece: small beside the (N, O) that would be read once per segment instead."""
    if len(segments) == 1:
        return segments[0].to(dtype)
    return torch.cat([segment.to(dtype) for segment in segments])


def _segment_grads(
    scaled: Tensor, dy: Tensor, segments: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """dB of the segments in `needed`: one product from the first of them on, since the schedule freezes in order."""
    sizes = [len(segment) for segment in segments]
    first = list(needed).index(True)
    grads = (scaled[:, sum(sizes[:first]) :].t() @ dy).split(sizes[first:])
    trained: list[Tensor | None] = [
        grad.to(segment.dtype) if need else None
        for grad, segment, need in zip(grads, segments[first:], needed[first:], strict=True)
    ]
    return [*[None] * first, *trained]


def add_bottleneck(
    y: Tensor, x: Tensor, a: Tensor, s: Tensor, segments: Sequence[Tensor], alpha: float, *, own_y: bool
) -> Tensor:
    """y + alpha * ((x A) S) B, keeping x A alone; written into y's memory where `own_y` says that nobody holds y.

    Args: y (..., O), x (..., D), A (D, r), S (r, r), segments of B (rows, O). Second derivatives raise RuntimeError.
    """
    return _Bottleneck.apply(y, x, a, s, alpha, own_y and y.is_contiguous(), *segments)


def add_bottleneck_plain(
    y: Tensor, x: Tensor, a: Tensor, s: Tensor, segments: Sequence[Tensor], alpha: float
) -> Tensor:
    """The same function and gradients in plain autograd, which keeps (x A) S too while B trains; for compilers."""
    with no_autocast(y):
        h = x.to(y.dtype) @ a.to(y.dtype)
        return y + (h @ (alpha * s).to(y.dtype)) @ _rows(segments, y.dtype)


def is_ordinary(y: object) -> bool:
    """Whether `y` is a tensor with values of its own (or a fake one), not a subclass that must see every operator."""
    return type(y) in (Tensor, nn.Parameter) or isinstance(y, FakeTensor)
