"""Calls the C++ kernel of `selected_attention_backward`, csrc/selected_attention_backward.cpp, for single keys.

What that does not serve goes to the plain implementation, as in `selected_attention`.
"""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

from torch import Tensor

from .._native import DTYPE_CODES, function
from ..selected_attention.blocks import statistics_dtype
from ..selected_attention.native import by_rows, copied_bytes, numbers, refuse, row_strides, serves, sizes
from . import reference

SCRATCH_BYTES = 2 * 2**20
"""What probabilities and gradients of scores of the rows that are worked on at once may take."""
MAX_ROWS = 256  # kMaxRows in csrc/selected_attention_backward.cpp

_kernel = function(
    "ms_selected_attention_backward",
    *[c_void_p] * 6,  # doutput, query, key, value, output, strides
    *(c_int64, c_void_p, c_void_p, c_void_p, c_double),  # dtype, lists, logsumexp, sizes, scale
    *[c_void_p] * 4,  # scratch, dquery, dkey, dvalue
)


def launch(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> Tensor:
    if not serves(query, value, block_size):
        tensors = doutput, query, key, value, indices, mask, output, logsumexp, dkey, dvalue
        return reference.selected_attention_backward(*tensors, is_causal, window, position, block_size, scale)
    doutput, query, key, value, output = (by_rows(x) for x in (doutput, query, key, value, output))
    indices, logsumexp = indices.contiguous(), logsumexp.contiguous()
    dquery = query.new_empty(query.shape)
    rows = rows_at_once(query, indices)
    scratch = query.new_empty(_scratch_elements(query, indices, rows), dtype=statistics_dtype(query))
    counts = numbers(*sizes(query, key, value, indices), key.shape[2], rows)
    wrong = _kernel(
        *(doutput.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(), output.data_ptr()),
        *(numbers(*row_strides(doutput, query, key, value, output)), DTYPE_CODES[query.dtype], indices.data_ptr()),
        *(logsumexp.data_ptr(), counts, scale, scratch.data_ptr()),
        *(dquery.data_ptr(), dkey.data_ptr(), dvalue.data_ptr()),
    )
    refuse(wrong, indices, key.shape[2])
    return dquery


def rows_at_once(query: Tensor, indices: Tensor) -> int:
    """Of each head."""
    row_bytes = 2 * query.shape[0] * query.shape[1] * indices.shape[3] * statistics_dtype(query).itemsize
    return max(1, min(query.shape[2], MAX_ROWS, SCRATCH_BYTES // max(1, row_bytes)))


def _scratch_elements(query: Tensor, indices: Tensor, rows: int) -> int:
    return 2 * query.shape[0] * query.shape[1] * rows * indices.shape[3]


def workspace_bytes(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    mask: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
    is_causal: bool,
    window: int,
    position: int,
    block_size: int,
    scale: float,
) -> int:
    """Probabilities and gradients of the scores of some rows."""
    if not serves(query, value, block_size):
        tensors = doutput, query, key, value, indices, mask, output, logsumexp, dkey, dvalue
        return reference.workspace_bytes(*tensors, is_causal, window, position, block_size, scale)
    lists = 0 if indices.is_contiguous() else 4 * indices.numel()
    sums = 0 if logsumexp.is_contiguous() else logsumexp.numel() * logsumexp.element_size()
    wide = statistics_dtype(query).itemsize
    scratch = wide * _scratch_elements(query, indices, rows_at_once(query, indices))
    return copied_bytes(doutput, query, key, value, output) + lists + sums + scratch
