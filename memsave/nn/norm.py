"""RMSNorm and LayerNorm that attach notes to what they return, so that the linears they feed keep nothing.

x is (..., D), N rows; weight and bias (D,); rstd (N,). Kept for backward: x as it came, and rstd; LayerNorm of float32
and float64 is torch's own, which keeps the means, too. The mathematics is in `rms_norm.py` and `layer_norm.py`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import note
from .converted import Converted
from .eager import autocast_now, no_autocast, once_differentiable, only_input, plain
from .layer_norm import is_served, layer_norm, layer_norm_backward, widens
from .rms_norm import Style, eps_of, rms_norm, rms_norm_backward


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float | None, style: Style, double: bool) -> Tensor:
        with no_autocast(x):
            y, rstd = rms_norm(x, weight, eps, style, double)
        ctx.style = style
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        with no_autocast(dy):
            dx, dweight = rms_norm_backward(dy, x, rstd, weight, ctx.style, ctx.needs_input_grad[1])
        return dx, dweight, None, None, None


class ConvertedRMSNorm(Converted):
    """Any RMSNorm over the last dimension whose own forward agrees with one of the known styles: the part "style"."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or plain(x) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        style: Style | None = self._memsave_parts["style_float64" if x.dtype == torch.float64 else "style"]
        if style is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        double = isinstance(self, nn.RMSNorm)
        weight: Tensor | None = getattr(self, "weight", None)
        eps = eps_of(self)  # type: ignore[arg-type]
        y = _RMSNorm.apply(x, weight, eps, style, double)

        def recompute(x: Tensor, weight: Tensor | None = None) -> Tensor:
            return rms_norm(x, weight, eps, style, double)[0]

        small = () if weight is None else (weight.detach().clone(),)
        note.attach(y, note.Recipe(recompute, (True, False)[: 1 + len(small)]), (x.detach(), *small))
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The original forward."""
        return super().forward(x)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """N * D elements of x and N of rstd."""
        statistic = torch.float64 if dtype == torch.float64 and isinstance(self, nn.RMSNorm) else torch.float32
        return prod(input_shape) * dtype.itemsize + prod(input_shape[:-1]) * statistic.itemsize


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> Tensor:
        y, rstd = layer_norm(x, weight, bias, eps, widen)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        _, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad
        dx, dweight, dbias = layer_norm_backward(dy, x, rstd, weight, needs_dweight, needs_dbias)
        return (
            dx,
            dweight.to(weight.dtype) if needs_dweight else None,
            dbias.to(ctx.bias_dtype) if needs_dbias else None,
            None,
            None,
        )


class ConvertedLayerNorm(Converted):
    """`nn.LayerNorm` over the last dimension: of inputs in half types by memsave's ops, of others by torch's."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or plain(x) or not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        weight, bias, eps = self.weight, self.bias, self.eps  # type: ignore[attr-defined]
        if is_served(x, weight, bias):
            widen = widens(x)
            y = _LayerNorm.apply(x, weight, bias, eps, widen)

            def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return layer_norm(x, weight, bias, eps, widen)[0]
        else:
            y = super().forward(*args, **kwargs)  # type: ignore[misc]
            shape, autocast = self.normalized_shape, autocast_now(x)  # type: ignore[attr-defined]

            def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                with autocast():
                    return F.layer_norm(x, shape, weight, bias, eps)

        copies = {name: p.detach().clone() for name, p in (("weight", weight), ("bias", bias)) if p is not None}
        names = tuple(copies)

        def recompute(x: Tensor, *affine: Tensor) -> Tensor:
            given = dict(zip(names, affine, strict=True))
            return normalize(x, given.get("weight"), given.get("bias"))

        recipe = note.Recipe(recompute, (True, *(False for _ in names)))
        note.attach(y, recipe, (x.detach(), *copies.values()))
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The original forward."""
        return super().forward(x)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """N * D elements of x, and of each row rstd in fp32, or mean and rstd where x has fp32 or fp64."""
        statistics = 4 if dtype.itemsize == 2 else 2 * dtype.itemsize
        return prod(input_shape) * dtype.itemsize + prod(input_shape[:-1]) * statistics
