"""Plain PyTorch implementation of `new_seed`."""

from __future__ import annotations

import torch
from torch import Tensor


def new_seed(like: Tensor) -> Tensor:
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=like.device)


def workspace_bytes(like: Tensor) -> int:
    return 0
