"""Calls the C++ kernel of `logit_statistics`, csrc/logit_statistics.cpp; plain PyTorch serves float64."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from . import reference

_kernel = function(
    "ms_logit_statistics",
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # logits: address, dtype, shape, row stride
    *(c_void_p, c_float),  # target, softcap
    *(c_void_p, c_void_p, c_void_p, c_void_p),  # peak, log_sum, at_target, total
)


def launch(logits: Tensor, target: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return reference.logit_statistics(logits, target, softcap)
    rows, target = rows_of(logits), target.contiguous()
    peak, log_sum, at_target, total = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(4))
    _kernel(
        *(rows.data_ptr(), DTYPE_CODES[logits.dtype], *logits.shape, rows.stride(0)),
        *(target.data_ptr(), softcap or 0.0),
        *(tensor.data_ptr() for tensor in (peak, log_sum, at_target, total)),
    )
    return peak, log_sum, at_target, total


def workspace_bytes(logits: Tensor, target: Tensor, softcap: float | None) -> int:
    if logits.dtype == torch.float64:
        return reference.workspace_bytes(logits, target, softcap)
    return rows_bytes(logits) + (0 if target.is_contiguous() else target.nbytes)
