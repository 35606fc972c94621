"""RMSNorm and LayerNorm that attach notes to what they return, so that the linears they feed keep nothing.

x is (..., D), N rows; weight (D,); rstd (N,). Kept for backward: x, and rstd (RMSNorm) or mean and rstd
(LayerNorm). Nothing is upcast. RMSNorm's mathematics is in `rms_norm.py`; LayerNorm (Ba et al. 2016, arXiv
1607.06450) is torch's.
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


class ConvertedLayerNorm(Converted):
    """`nn.LayerNorm` with a note; torch's own kernel already keeps x and two statistics per row."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or plain(x) or not torch.is_grad_enabled():
            return y
        shape, eps, autocast = self.normalized_shape, self.eps, autocast_now(x)  # type: ignore[attr-defined]

        def recompute(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
            with autocast():
                return F.layer_norm(x, shape, weight, bias, eps)

        affine = (self.weight, self.bias)  # type: ignore[attr-defined]
        copies = [p.detach().clone() for p in affine if p is not None]
        note.attach(y, note.Recipe(recompute, (True, *(False for _ in copies))), (x.detach(), *copies))
        return y

    def reference(self, x: Tensor) -> Tensor:
        """The original forward."""
        return super().forward(x)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """N * D elements of x, and mean and rstd of each row: on the CPU in the weight's dtype, elsewhere fp32."""
        weight: Tensor | None = self.weight  # type: ignore[attr-defined]
        statistic = max(dtype.itemsize, 4)
        if weight is None or weight.device.type == "cpu":
            statistic = dtype.itemsize if weight is None else weight.dtype.itemsize
        return prod(input_shape) * dtype.itemsize + 2 * prod(input_shape[:-1]) * statistic
