"""`sampled_matmul` on the CPU: rows gathered by the C++ kernel, then torch's own matrix product."""

from __future__ import annotations

from torch import Tensor

from ..gather_rows import native as gather_rows
from .reference import product


def launch(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return product(gather_rows.launch(dy, rows, scale), kept)


def workspace_bytes(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> int:
    gathered = rows.shape[0] * dy.shape[1] * dy.element_size()
    out = dy.shape[1] * kept.shape[1] * dy.element_size()
    return gathered + max(gather_rows.workspace_bytes(dy, rows, scale) - out, 0)  # out is not there yet while gathering
