"""Plain PyTorch implementation of `logit_statistics`, some rows at a time: temporary bytes stay small.

C rows, V classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 8 * 2**20


def statistic_dtype(logits: torch.dtype) -> torch.dtype:
    return torch.float64 if logits == torch.float64 else torch.float32


def blocks(logits: Tensor) -> Iterator[slice]:
    """Rows that take BLOCK_BYTES in the dtype of the statistics, or one row."""
    size = block_rows(logits)
    return (slice(start, start + size) for start in range(0, logits.shape[0], size))


def block_rows(logits: Tensor) -> int:
    return max(1, BLOCK_BYTES // max(1, logits.shape[1] * statistic_dtype(logits.dtype).itemsize))


def logit_statistics(logits: Tensor, target: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, (n, classes) = statistic_dtype(logits.dtype), logits.shape
    peak, log_sum, at_target, total = (logits.new_zeros(n, dtype=wide) for _ in range(4))
    if classes == 0:
        return peak, log_sum.fill_(float("-inf")), at_target, total
    for rows in blocks(logits):
        z = logits[rows].to(wide)
        if softcap is not None:
            z = torch.div(z, softcap).tanh_().mul_(softcap)
        torch.amax(z, 1, out=peak[rows])
        peak[rows].masked_fill_(peak[rows].isinf(), 0.0)
        torch.sum(z, 1, out=total[rows])
        here = (target[rows] >= 0) & (target[rows] < classes)
        found = z.gather(1, target[rows].clamp(0, classes - 1).unsqueeze(1)).squeeze(1)
        at_target[rows] = torch.where(here, found, 0.0)
        torch.sum(z.sub(peak[rows].unsqueeze(1)).exp_(), 1, out=log_sum[rows])
    return peak, log_sum.log_(), at_target, total


def workspace_bytes(logits: Tensor, target: Tensor, softcap: float | None) -> int:
    """Of a block: z where it is not the logits themselves, z - peak, and the target's z, their places and a mask."""
    n, classes = logits.shape
    if n == 0 or classes == 0:
        return 0
    wide, rows = statistic_dtype(logits.dtype), min(n, block_rows(logits))
    copies = 1 + (logits.dtype != wide or softcap is not None)
    return rows * classes * wide.itemsize * copies + rows * (1 + wide.itemsize)
