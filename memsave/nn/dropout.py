"""Dropout that keeps one bit per element, and hands on the note of its input.

x and y are (..., D), N rows; bits (N, ceil(D / 8)) uint8. Kept for backward: the bits. torch draws the mask, with
the same random numbers as for the plain module, so that the mask and the random stream are the same. Srivastava et al.
2014, JMLR 15.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from . import note as notes
from .converted import Converted
from .eager import only_input, plain
from .matrix import as_matrix, in_shape


class _Dropout(torch.autograd.Function):
    """(y, bits): y = x / (1 - p) where the bit is set, else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor]:
        ctx.scale = scale
        if x.is_cuda:
            y, mask = torch.native_dropout(x, p, True)
            bits = ops.pack_bits(as_matrix(mask))
        else:
            # Of the same shape and strides as the noise that torch draws, which is of the dtype of x.
            mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
            bits = ops.pack_bits(as_matrix(mask))
            y = _masked(x, bits, scale)
        ctx.save_for_backward(bits)
        ctx.mark_non_differentiable(bits)
        return y, bits

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, None, None]:
        return _gradient(ctx, dy), None, None


class _Mask(torch.autograd.Function):
    """x * (scale where the bit is set, else 0), which is its own gradient: differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(bits)
        return _masked(x, bits, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _gradient(ctx, dy), None, None


def _gradient(ctx: Any, dy: Tensor) -> Tensor:
    mask: Callable[..., Tensor] = _Mask.apply if torch.is_grad_enabled() else _masked
    return mask(dy, *ctx.saved_tensors, ctx.scale)


def _masked(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    return in_shape(ops.masked_scale(as_matrix(x), bits, scale), x.shape)


def _scale(x: Tensor, p: float) -> float:
    """1 / (1 - p) as torch rounds it: on the CPU to the dtype of x, in its CUDA kernel to float32."""
    return 1 / (1 - p) if x.is_cuda else float(torch.ones((), dtype=x.dtype).div_(1 - p))


class ConvertedDropout(Converted):
    """`nn.Dropout` that keeps bits. What it returns unchanged keeps its own note."""

    p: float
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or not self._draws(x):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        scale = _scale(x, self.p)
        y, bits = _Dropout.apply(x, self.p, scale)
        if notes.find(x) is not None:  # without one, keeping x in place of y would free nothing
            recompute, tensors, per_row = notes.source(x)
            recipe = notes.Recipe(partial(_again, recompute, scale), (*per_row, True))
            notes.attach(y, recipe, (*tensors, bits))
        return y

    def _draws(self, x: Tensor) -> bool:
        """Whether this is a call for which a mask is drawn and kept."""
        return (
            not plain(x)
            and not is_traceable_wrapper_subclass(x)
            and x.device.type in ("cpu", "cuda", "meta")  # of others it is not known how torch draws
            and torch.is_grad_enabled()
            and self.training
            and 0 < self.p < 1
            and x.numel() > 0
            and x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        )

    def reference(self, x: Tensor) -> Tensor:
        """The original forward."""
        return super().forward(x)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """N * ceil(D / 8); one element for p = 1, where torch multiplies by a zero; nothing where it drops nothing."""
        if not self.training or self.p == 0:
            return 0
        *leading, features = input_shape or (1,)
        return dtype.itemsize if self.p == 1 else prod(leading) * ((features + 7) // 8)


def _again(recompute: Callable[..., Tensor], scale: float, *kept: Tensor) -> Tensor:
    """The output, from what its input is recomputed from and the bits."""
    *tensors, bits = kept
    return _masked(recompute(*tensors), bits, scale)
