"""Calls the C++ kernel of the same name, csrc/logit_statistics_backward.cpp; plain PyTorch serves float64."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .._native import DTYPE_CODES, function, rows_bytes, rows_of
from . import reference

_kernel = function(
    "ms_logit_statistics_backward",
    *(c_void_p, c_int64, c_int64, c_int64, c_int64),  # logits: address, dtype, shape, row stride
    *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),  # target, peak, log_sum and the three gradients
    c_float,  # softcap
)


def launch(
    logits: Tensor,
    target: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_lse: Tensor,
    d_target: Tensor,
    d_total: Tensor,
    softcap: float | None,
) -> None:
    if logits.dtype == torch.float64:
        return reference.logit_statistics_backward(logits, target, peak, log_sum, d_lse, d_target, d_total, softcap)
    rows = rows_of(logits)
    numbers = [t.contiguous() for t in (target, peak, log_sum, d_lse, d_target, d_total)]
    _kernel(
        *(rows.data_ptr(), DTYPE_CODES[logits.dtype], *logits.shape, rows.stride(0)),
        *(tensor.data_ptr() for tensor in numbers),
        softcap or 0.0,
    )
    if rows is not logits:
        logits.copy_(rows)


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
    if logits.dtype == torch.float64:
        return reference.workspace_bytes(logits, target, peak, log_sum, d_lse, d_target, d_total, softcap)
    numbers = (target, peak, log_sum, d_lse, d_target, d_total)
    return rows_bytes(logits) + sum(t.nbytes for t in numbers if not t.is_contiguous())
