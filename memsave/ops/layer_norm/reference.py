"""Plain PyTorch implementation of `layer_norm`: torch's own kernel, with a statistic that is not rounded.

N rows, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rms_norm.style import statistic_dtype


def _takes_rows_as_they_are(x: Tensor, widen: bool) -> bool:
    """On the CPU torch's kernel takes half rows beside float32 parameters, and keeps statistics in float32 then."""
    return x.device.type == "cpu" and not widen


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> tuple[Tensor, Tensor]:
    n, features = x.shape
    wide = statistic_dtype(x.dtype, double=True)
    y_dtype = wide if widen else x.dtype
    if features == 0:
        return x.new_empty(x.shape, dtype=y_dtype), x.new_full((n,), float("nan"), dtype=wide)
    rows = x.contiguous() if _takes_rows_as_they_are(x, widen) else x.contiguous().to(wide)
    scale = x.new_ones(features, dtype=wide) if weight is None else weight.to(wide).contiguous()
    shift = None if bias is None else bias.to(wide).contiguous()
    y, _, rstd = torch.native_layer_norm(rows, (features,), scale, shift, eps)
    return y.to(y_dtype), rstd.view(n)


def workspace_bytes(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, widen: bool) -> int:
    """Copies of the rows and of the parameters, the mean, and y before it is rounded."""
    n, features = x.shape
    wide = statistic_dtype(x.dtype, double=True)
    if features == 0:
        return 0
    rows = 0 if x.is_contiguous() else x.element_size()
    rounded = 0
    if not _takes_rows_as_they_are(x, widen) and x.dtype != wide:
        rows = wide.itemsize
        rounded = 0 if widen else wide.itemsize
    copies = int(weight is None or weight.dtype != wide or not weight.is_contiguous())
    copies += bias is not None and (bias.dtype != wide or not bias.is_contiguous())
    return (rows + rounded) * n * features + wide.itemsize * (copies * features + n)
