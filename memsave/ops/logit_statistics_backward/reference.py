"""Plain PyTorch implementation of `logit_statistics_backward`, some rows at a time: temporary bytes stay small.

C rows, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..logit_statistics.reference import block_rows, blocks, statistic_dtype


def logit_statistics_backward(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_lse: Tensor,
    d_target: Tensor,
    d_total: Tensor,
    softcap: float | None,
) -> None:
    wide, classes = statistic_dtype(logits.dtype), logits.shape[1]
    if classes == 0:
        return
    here = (target >= 0) & (target < classes)
    places, d_target = target.clamp(0, classes - 1), torch.where(here, d_target, 0.0)
    for rows in blocks(logits):
        tanh, z = None, logits[rows].to(wide)  # the logits themselves, where they are of that dtype
        if softcap is not None:
            tanh = torch.div(z, softcap).tanh_()
            z = torch.mul(tanh, softcap, out=z)
        z.sub_(peak[rows].unsqueeze(1)).sub_(log_sum[rows].unsqueeze(1)).exp_().mul_(d_lse[rows].unsqueeze(1))
        z.scatter_add_(1, places[rows].unsqueeze(1), d_target[rows].unsqueeze(1)).add_(d_total[rows].unsqueeze(1))
        if tanh is not None:
            z.mul_(tanh.square_().neg_().add_(1.0))
        if logits.dtype != wide:
            logits[rows] = z
        del z, tanh  # before the next block


def workspace_bytes(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_lse: Tensor,
    d_target: Tensor,
    d_total: Tensor,
    softcap: float | None,
) -> int:
    """Masks, places and gradients of the targets; of a block, z where it is not the logits themselves, and its tanh."""
    n, classes = logits.shape
    if n == 0 or classes == 0:
        return 0
    wide, rows = statistic_dtype(logits.dtype), min(n, block_rows(logits))
    copies = (logits.dtype != wide) + (softcap is not None)
    return n * (1 + target.itemsize + wide.itemsize) + rows * classes * wide.itemsize * copies
