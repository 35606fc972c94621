"""RMSNorm and LayerNorm that attach notes to what they return, so that the linears they feed keep nothing.

x is (..., D), N rows; weight (D,); rstd (..., 1) = 1 / sqrt(mean(x^2) + eps), fp32 (fp64 for fp64).
Kept for backward: x, and rstd (RMSNorm) or mean and rstd (LayerNorm). Nothing is upcast.
RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467. LayerNorm: Ba et al. 2016, arXiv 1607.06450.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import note
from .converted import Converted, original_class
from .eager import autocast_now, no_autocast, plain


class Style(str, Enum):
    """Where RMSNorms round to the input's dtype and how they apply the weight; xhat = x * rstd in fp32."""

    CAST_THEN_SCALE = "weight * cast(xhat)"
    CAST_TO_WEIGHT = "weight * xhat, cast to the weight's dtype if that is a half type"
    SCALE_THEN_CAST = "cast(weight * xhat)"
    ONE_PLUS = "cast((1 + weight) * xhat)"


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, style: Style, double: bool) -> tuple[Tensor, Tensor]:
    """y (..., D) and rstd (..., 1) of RMSNorm in the given style.

    Statistics are fp32, and fp64 for fp64 inputs where `double`; without eps it is the machine epsilon of their dtype.
    """
    wide = x.to(torch.float64 if double and x.dtype == torch.float64 else torch.float32)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    xhat = wide * rstd
    if weight is None:
        return xhat.to(x.dtype), rstd
    if style is Style.CAST_THEN_SCALE:
        return weight * xhat.to(x.dtype), rstd
    if style is Style.CAST_TO_WEIGHT:
        return weight * (xhat.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else xhat), rstd
    scale = weight if style is Style.SCALE_THEN_CAST else 1.0 + weight.to(wide.dtype)
    return (scale * xhat).to(x.dtype), rstd


def _rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: Style
) -> tuple[Tensor, Tensor | None]:
    """dx (..., D) and dweight (D,) of RMSNorm."""
    xhat = x.to(rstd.dtype) * rstd
    dy = dy.to(rstd.dtype)
    dweight = None
    dxhat = dy
    if weight is not None:
        dweight = (dy * xhat).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        scale = weight.to(rstd.dtype) + (1.0 if style is Style.ONE_PLUS else 0.0)
        dxhat = dy * scale
    dx = (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)).mul_(rstd)
    return dx.to(x.dtype), dweight


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
            return (*_rms_norm_backward(dy, x, rstd, weight, ctx.style), None, None, None)


class ConvertedRMSNorm(Converted):
    """Any RMSNorm over the last dimension whose own forward agrees with one of the known styles (`rms_norm_style`)."""

    _parameters: dict[str, nn.Parameter | None]

    def forward(self, x: Tensor) -> Tensor:
        if plain(x) or not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        style = rms_norm_style(self)  # type: ignore[arg-type]
        if style is None or (style is Style.CAST_TO_WEIGHT and x.dtype == torch.float64):
            return super().forward(x)  # type: ignore[misc]  # changed since conversion, or fp64 with fp32 statistics
        weight, eps, double = self._parameters.get("weight"), _eps(self), isinstance(self, nn.RMSNorm)
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

    def forward(self, x: Tensor) -> Tensor:
        if plain(x) or not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        y = super().forward(x)  # type: ignore[misc]
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


def _eps(module: Any) -> float | None:
    """The module's eps under whichever name it has; None is torch's "machine epsilon"."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(module, name, None), float):
            return getattr(module, name)
    return None


def is_rms_norm(module: nn.Module) -> bool:
    """Whether `module` looks like an RMSNorm: its class's name, and at most one parameter, a 1-D `weight`."""
    cls = original_class(module)
    named = "RMSNorm" in cls.__name__ or cls.__name__.endswith("T5LayerNorm")
    weight = module._parameters.get("weight")
    alone = set(module._parameters) <= {"weight"} and not module._buffers and not module._modules
    return cls is nn.RMSNorm or (named and alone and (weight is None or weight.dim() == 1))


_Forward = Callable[[nn.Module, Tensor], Tensor]
_styles: dict[tuple[object, ...], Style | None] = {}


def rms_norm_style(module: nn.Module) -> Style | None:
    """Which style the module's original forward computes, found by running it on a few random rows; None if none fits.

    The verdict is remembered per class, eps, width and dtype. The module, its weight's values and torch's random
    state are not touched, so this works on meta and sharded weights, too.
    """
    cls = original_class(module)
    if cls is nn.RMSNorm:
        return Style.SCALE_THEN_CAST
    weight = module._parameters.get("weight")
    key = (cls, _eps(module), None if weight is None else (tuple(weight.shape), weight.dtype))
    if key not in _styles:
        _styles[key] = _probe(module, cls.forward, weight)
    return _styles[key]


@torch.no_grad()
def _probe(module: nn.Module, forward: _Forward, weight: Tensor | None) -> Style | None:
    """Compare `forward` with every style on random rows, in the weight's dtype and in bf16."""
    generator = torch.Generator().manual_seed(0)
    width = 64 if weight is None else weight.shape[0]
    stand_in = module.__class__.__new__(module.__class__)
    stand_in.__dict__.update(module.__dict__)
    if weight is not None:
        random = torch.randn(width, generator=generator).to(weight.dtype)
        stand_in.__dict__["_parameters"] = {"weight": nn.Parameter(random, requires_grad=False)}
    inputs = [torch.randn(8, width, generator=generator) * 3 for _ in range(2)]
    inputs[1] = inputs[1].bfloat16()
    fitting = [style for style in Style if all(_agrees(stand_in, forward, x, style) for x in inputs)]
    return fitting[0] if fitting else None


def _agrees(module: nn.Module, forward: _Forward, x: Tensor, style: Style) -> bool:
    """Whether `forward` gives this style's output: same dtype and shape, and rounded alike (a rare last bit aside)."""
    try:
        expected = forward(module, x)
    except (TypeError, RuntimeError, AttributeError, ValueError):
        return False
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    y, _ = rms_norm(x, module._parameters.get("weight"), _eps(module), style, double=False)
    if y.dtype != expected.dtype:
        return False
    eps = torch.finfo(y.dtype).eps
    close = torch.allclose(y.float(), expected.float(), rtol=4 * eps, atol=4 * eps)
    rounded_alike = (y != expected).float().mean() < 0.01 or y.dtype == torch.float32
    return close and bool(rounded_alike)
