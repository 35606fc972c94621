"""RMSNorm on tensors of any shape, and recognizing which RMSNorm a module computes.

x is (..., D), N rows; weight (D,); rstd (N,) = 1 / sqrt(mean(x^2) + eps), fp32 (fp64 for fp64). The mathematics is in
`ops/rms_norm` and `ops/rms_norm_backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from .. import ops
from ..ops.rms_norm import reference
from ..ops.rms_norm.style import Style, statistic_dtype
from ..ops.rms_norm_backward import reference as backward_reference
from .converted import original_class
from .matrix import as_matrix, in_shape
from .probing import own_attributes, takes_one_input


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None, style: Style, double: bool) -> tuple[Tensor, Tensor]:
    """y (..., D) and rstd (N,) of RMSNorm in the given style; see `ops.rms_norm`."""
    if is_traceable_wrapper_subclass(x):  # a DTensor knows torch's operators only; here rstd is (...)
        eps = torch.finfo(statistic_dtype(x.dtype, double)).eps if eps is None else eps
        return reference.rms_norm(x, weight, eps, style, double)
    y, rstd = ops.rms_norm(as_matrix(x), weight, eps, style, double)
    return in_shape(y, x.shape), rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: Style, needs_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dx (..., D) and dweight (D,), or None where it is not needed; see `ops.rms_norm_backward`."""
    needs_dweight = needs_dweight and weight is not None
    if is_traceable_wrapper_subclass(x):
        dx, dweight = backward_reference.rms_norm_backward(dy, x, rstd, weight, style, needs_dweight)
    else:
        dy, rows = as_matrix(dy), as_matrix(x)  # (N, D)
        dx, dweight = ops.rms_norm_backward(dy, rows, rstd, weight, style, needs_dweight)
        dx = dx.view(x.shape)
    return dx, dweight if needs_dweight else None


def eps_of(module: nn.Module) -> float | None:
    """The module's eps under whichever name it has; None where it has none, or `nn.RMSNorm`'s None."""
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, Real):
            return float(value)
    return None


def is_rms_norm(module: nn.Module) -> bool:
    """Whether `module` may be an RMSNorm: by its class's name, and at most one parameter, a 1-D `weight`.

    Families that follow T5 call theirs a LayerNorm; what it computes is `rms_norm_style`'s to find out.
    """
    cls = original_class(module)
    if cls is nn.RMSNorm:
        return True
    weight = module._parameters.get("weight")
    named = "RMSNorm" in cls.__name__ or ("Norm" in cls.__name__ and weight is not None)
    alone = set(module._parameters) <= {"weight"} and not module._buffers and not module._modules
    return named and alone and not isinstance(module, nn.LayerNorm) and (weight is None or weight.dim() == 1)


_styles: dict[tuple[object, ...], Style | None] = {}


def rms_norm_style(module: nn.Module, *, float64: bool = False) -> Style | None:
    """Which style the module's original forward computes, found by running it on a few random rows; None if none fits.

    Most RMSNorms compute in fp32 whatever they are given, but not all: for fp64 inputs (`float64`) the verdict may
    differ.

    The verdict is remembered for modules of one class with equal attributes. The module, its weight's values and
    torch's random state are not touched, so this works on meta, fake and sharded weights, too.
    """
    cls = original_class(module)
    if cls is nn.RMSNorm:
        return Style.SCALE_THEN_CAST if module.eps is None or isinstance(module.eps, Real) else None
    if eps_of(module) is None or not takes_one_input(cls.forward):
        return None
    weight = module._parameters.get("weight")
    own = own_attributes(module)
    shape = None if weight is None else (weight.shape, weight.dtype)
    key = (cls, float64, shape, own)
    if own is None or key not in _styles:
        style = _probe(module, cls.forward, weight, (torch.float64,) if float64 else (torch.float32, torch.bfloat16))
        if own is None:
            return style
        _styles[key] = style
    return _styles[key]


_MAGNITUDES = (3.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0)  # so that eps counts in some rows


@torch.no_grad()
def _probe(
    module: nn.Module, forward: Callable[..., Any], weight: Tensor | None, dtypes: tuple[torch.dtype, ...]
) -> Style | None:
    """Compare `forward` with every style on random rows of several magnitudes and shapes, in every one of `dtypes`."""
    with _disable_current_modes(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        width = 64 if weight is None else weight.shape[0]
        rows = torch.randn(8, width, generator=generator) * torch.tensor(_MAGNITUDES)[:, None]
        inputs = [x for part in (rows, rows.view(2, 4, width)) for x in map(part.to, dtypes)]
        random = torch.randn(width, generator=generator)
        fitting = set(Style)
        for dtype in {*dtypes, dtypes[0] if weight is None else weight.dtype}:
            stand_in = module.__class__.__new__(module.__class__)
            stand_in.__dict__.update(module.__dict__)
            if weight is not None:
                stand_in.__dict__["_parameters"] = {"weight": nn.Parameter(random.to(dtype), requires_grad=False)}
            fitting = {s for s in fitting if all(_agrees(stand_in, forward, x, s) for x in inputs)}
    return next((style for style in Style if style in fitting), None)


def _agrees(module: nn.Module, forward: Callable[..., Any], x: Tensor, style: Style) -> bool:
    """Whether `forward` gives this style's output: same dtype and shape, and rounded alike (a rare last bit aside)."""
    try:
        expected = forward(module, x)
    except Exception:  # a forward of another kind may fail in any way on this input: then it is none of these
        return False
    if not isinstance(expected, Tensor) or expected.shape != x.shape:
        return False
    y, _ = rms_norm(x, module._parameters.get("weight"), eps_of(module), style, double=False)
    if y.dtype != expected.dtype:
        return False
    error, size = (y.double() - expected.double()).abs(), expected.double().abs()
    close = (error.amax(-1) <= 4 * torch.finfo(y.dtype).eps * size.amax(-1)).all()
    rounded_alike = (y != expected).float().mean() < 0.01 or y.dtype == torch.float32
    return bool(close and rounded_alike)
