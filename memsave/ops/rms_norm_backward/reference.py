"""Plain PyTorch implementation of `rms_norm_backward`.

N rows, D features.
"""

from __future__ import annotations

from torch import Tensor

from ..rms_norm.style import Style


def rms_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    rstd = rstd.unsqueeze(-1)  # (N, 1)
    xhat = x.contiguous().to(rstd.dtype) * rstd  # (N, D)
    dy = dy.contiguous().to(rstd.dtype)
    dweight = x.new_empty(0)
    dxhat = dy
    if weight is not None:
        if needs_dweight:
            dweight = (dy * xhat).reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0).to(weight.dtype)  # (D,)
        scale = weight.to(rstd.dtype)
        dxhat = dy * (1.0 + scale if style == Style.ONE_PLUS else scale)
    dx = (dxhat - xhat * (dxhat * xhat).mean(-1, keepdim=True)).mul_(rstd)
    return dx.to(x.dtype), dweight


def workspace_bytes(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, style: int, needs_dweight: bool) -> int:
    """At the difference of two products: xhat, dxhat, one product and the difference, which may become dx."""
    wide = rstd.dtype
    each = x.numel() * wide.itemsize
    peak = each * 3 + (0 if dy.dtype == wide and dy.is_contiguous() else each)
    if weight is not None:
        peak += each + (0 if weight.dtype == wide else weight.shape[0] * wide.itemsize)
    return peak - x.numel() * x.element_size()
