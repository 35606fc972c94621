"""Plain PyTorch implementation of `gather_rows`.

N rows, D features, k kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    kept = x.index_select(0, rows)  # (k, D)
    if scale is None:
        return kept
    product_dtype = torch.promote_types(x.dtype, torch.float32)
    return (kept.to(product_dtype) * scale.to(product_dtype)[:, None]).to(x.dtype)


def workspace_bytes(x: Tensor, rows: Tensor, scale: Tensor | None) -> int:
    if scale is None:
        return 0
    kept = rows.shape[0] * x.shape[1]
    if x.element_size() < 4:
        return 2 * 4 * kept  # the rows and the product in float32
    return x.element_size() * kept + (8 * rows.shape[0] if x.dtype == torch.float64 else 0)
