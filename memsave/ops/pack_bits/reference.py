"""Plain PyTorch implementation of `pack_bits`.

N rows, D features, B = ceil(D / 8) bytes per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    n, d = mask.shape
    filled = F.pad(mask.view(torch.uint8), (0, -d % 8)).view(n, (d + 7) // 8, 8)  # (N, B, 8)
    places = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (filled << places).sum(-1, dtype=torch.uint8)


def workspace_bytes(mask: Tensor) -> int:
    filled = mask.shape[0] * ((mask.shape[1] + 7) // 8) * 8
    return 2 * filled + 8
