"""Plain PyTorch implementation of `sampled_matmul`.

N rows, k kept rows, D input and O output features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gather_rows.reference import gather_rows
from ..gather_rows.reference import workspace_bytes as gather_workspace_bytes


def product(gathered: Tensor, kept: Tensor) -> Tensor:
    """(k, O), (k, D) -> (O, D), in their dtype also where autocast would choose another."""
    with torch.autocast(gathered.device.type, enabled=False):
        return gathered.t() @ kept


def sampled_matmul(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return product(gather_rows(dy, rows, scale), kept)


def workspace_bytes(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> int:
    gathered = rows.shape[0] * dy.shape[1] * dy.element_size()
    out = dy.shape[1] * kept.shape[1] * dy.element_size()
    return gathered + max(gather_workspace_bytes(dy, rows, scale) - out, 0)  # out is not there yet while gathering
