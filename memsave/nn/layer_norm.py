"""LayerNorm on tensors of any shape, for inputs in half types.

x is (..., D), N rows; weight and bias (D,); rstd (N,) float32. The mathematics is in `ops/layer_norm` and
`ops/layer_norm_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from ..ops.rms_norm.style import HALF
from .eager import autocast_enabled, no_autocast
from .matrix import as_matrix, in_shape


def widens(x: Tensor) -> bool:
    """Whether torch's own LayerNorm of x gives float32: under autocast, but not under that of the CPU."""
    return x.device.type == "cuda" and autocast_enabled(x)


def is_served(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether memsave's ops keep less than torch's LayerNorm of x or sum more precisely, and give the same dtypes.

    In float32 and float64 torch's own kernels keep x as it is, and are faster. Mixtures that torch refuses are left for
    it to refuse. What other devices' autocast does is theirs to know.
    """
    if x.dtype not in HALF or x.device.type not in ("cpu", "cuda") or is_traceable_wrapper_subclass(x):
        return False
    dtypes = {p.dtype for p in parameters if p is not None}
    beside = {x.dtype, torch.float32} if x.device.type == "cpu" else {x.dtype}
    return widens(x) or (len(dtypes) <= 1 and dtypes <= beside)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> tuple[Tensor, Tensor]:
    """y (..., D) and rstd (N,); see `ops.layer_norm`."""
    with no_autocast(x):
        y, rstd = ops.layer_norm(as_matrix(x), weight, bias, eps, widen)
    return in_shape(y, x.shape), rstd


def layer_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx (..., D), dweight and dbias, (D,) float32 or (0,) where not needed; see `ops.layer_norm_backward`."""
    dy, rows = as_matrix(dy), as_matrix(x)  # (N, D)
    with no_autocast(x):
        dx, dweight, dbias = ops.layer_norm_backward(dy, rows, rstd, weight, needs_dweight, needs_dbias)
    return dx.view(x.shape), dweight, dbias
