"""LayerNorm over the rows of a matrix, of which one statistic per row is kept.

N rows, D features. xhat = (x - mean) * rstd, rstd = 1 / sqrt(var(x) + eps). Ba et al. 2016, arXiv 1607.06450.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..rms_norm.style import statistic_dtype
from . import reference

__all__ = ["layer_norm"]


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> tuple[Tensor, Tensor]:
    wide = statistic_dtype(x.dtype, double=True)
    return x.new_empty(x.shape, dtype=wide if widen else x.dtype), x.new_empty(x.shape[:1], dtype=wide)


_op = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool widen) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference,
    kernels=("triton",),
)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool = False
) -> tuple[Tensor, Tensor]:
    """y = xhat * weight + bias, computed in the dtype of rstd and rounded once. The mean is not kept: x has it.

    Args:
        x: (N, D) floating point, any strides.
        weight: (D,) floating point, or None for ones.
        bias: (D,) floating point, or None for zeros.
        eps: added to the variance.
        widen: whether y has the dtype of rstd, as under autocast on GPUs, instead of that of x.

    Returns:
        y: (N, D), contiguous. On the CPU the bits are those of `torch.nn.functional.layer_norm`.
        rstd: (N,) float32, or float64 for float64 x.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            _check.floating(name, parameter, 1)
            _check.length(name, parameter, x.shape[1], "features of x")
    _check.same_device(x=x, weight=weight, bias=bias)
    return _op(x, weight, bias, eps, widen)
