"""Plain PyTorch implementation of `layer_norm_backward`: torch's own kernel, always in the dtype of rstd.

In half types torch's CPU kernel adds up the weight's and the bias's gradients in that type, off by 10% for 4,096 rows.

N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide, features = rstd.dtype, x.shape[1]
    if x.numel() == 0:
        dweight, dbias = (rstd.new_zeros(features if needed else 0) for needed in (needs_dweight, needs_dbias))
        return x.new_empty(x.shape), dweight, dbias
    rows = x.contiguous().to(wide)
    scale = rstd.new_ones(features) if weight is None else weight.to(wide).contiguous()
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward.default(
        dy.contiguous().to(wide),
        rows,
        [features],
        rows.mean(-1, keepdim=True),
        rstd.contiguous().unsqueeze(-1),
        scale,
        scale,  # stands for the bias, of which only the shape counts
        [True, needs_dweight, needs_dbias],
    )
    return dx.to(x.dtype), dweight if needs_dweight else rstd.new_empty(0), dbias if needs_dbias else rstd.new_empty(0)


def workspace_bytes(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, needs_dweight: bool, needs_dbias: bool
) -> int:
    """Widened or contiguous copies, the means, the sums of torch's threads, and dx before it is rounded."""
    if x.numel() == 0:
        return 0
    n, features = x.shape
    wide = rstd.dtype
    same = [t.dtype == wide and t.is_contiguous() for t in (dy, x)]
    copies = sum(not s for s in same) * x.numel() + n + (0 if rstd.is_contiguous() else n)
    copies += 0 if weight is not None and weight.dtype == wide and weight.is_contiguous() else features
    sums = 2 * torch.get_num_threads() * features if x.device.type == "cpu" and (needs_dweight or needs_dbias) else 0
    rounded = 0 if x.dtype == wide else x.numel() * (wide.itemsize - x.element_size())
    return wide.itemsize * (copies + sums) + rounded
