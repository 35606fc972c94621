"""Plain PyTorch implementation of `masked_scale`.

N rows, D features, B = ceil(D / 8) bytes per row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_scale(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    places = torch.arange(8, device=x.device, dtype=torch.uint8)
    spread = (bits.contiguous()[:, :, None] >> places) & 1  # (N, B, 8)
    mask = spread.view(x.shape[0], bits.shape[1] * 8)[:, : x.shape[1]]  # (N, D)
    factors = mask.to(torch.promote_types(x.dtype, torch.float32)).mul_(scale)
    return factors.mul_(x).to(x.dtype)


def workspace_bytes(x: Tensor, bits: Tensor, scale: float) -> int:
    spread, result = 8 * bits.numel(), x.numel() * x.element_size()
    wide = x.numel() * max(x.element_size(), 4)
    product = 0 if x.element_size() >= 4 else 2 * wide - result  # the factors, and x as wide as they are
    return 8 + max(spread + product, 2 * spread - result)
