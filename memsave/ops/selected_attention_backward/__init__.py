"""The gradients of `selected_attention`.

Shapes as there. Those of keys and values are added to what their tensors hold, so that the queries may come in parts.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..selected_attention import check_inputs
from ..selected_attention.blocks import statistics_dtype
from . import reference

_op = register(
    "selected_attention_backward(Tensor doutput, Tensor query, Tensor key, Tensor value, Tensor indices, Tensor? mask, "
    "Tensor output, Tensor logsumexp, Tensor(a!) dkey, Tensor(b!) dvalue, bool is_causal, int window, int position, "
    "int block_size, float scale) -> Tensor",
    fake=lambda doutput, query, *_: query.new_empty(query.shape),
    reference=reference,
    kernels=("native", "triton"),
)


def selected_attention_backward(
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
    """The gradient of the queries; those of keys and values are added to `dkey` and `dvalue`.

    Args:
        doutput: (B, h, R, E) dtype of query, any strides: the gradient of the output.
        query, key, value, indices, mask, is_causal, window, position, block_size, scale: as `selected_attention` got
            them.
        output, logsumexp: what it returned.
        dkey, dvalue: (B, kv, S, D) and (B, kv, S, E) contiguous, float32, float64 for float64.

    Returns:
        (B, h, R, D) of dtype of query.

    Raises:
        ValueError: a tensor of another shape or dtype, a number outside its range, tensors on several devices.
        IndexError: as there.
        RuntimeError: an input requires grad while grad mode is on.
    """
    check_inputs(query, key, value, indices, mask, is_causal, window, position, block_size)
    wide = statistics_dtype(query)
    shape = (*query.shape[:3], value.shape[3])
    for name, tensor in (("doutput", doutput), ("output", output)):
        _check.typed(name, tensor, query.dtype, 4)
        if tensor.shape != shape:
            raise ValueError(f"{name} must be (B, h, R, E) = {shape}; got {tuple(tensor.shape)}.")
    _check.typed("logsumexp", logsumexp, wide, 3)
    if logsumexp.shape != query.shape[:3]:
        raise ValueError(f"logsumexp must be (B, h, R) = {tuple(query.shape[:3])}; got {tuple(logsumexp.shape)}.")
    for name, tensor, of in (("dkey", dkey, key), ("dvalue", dvalue, value)):
        _check.typed(name, tensor, wide, 4)
        if tensor.shape != of.shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, of shape {tuple(of.shape)}; got {tuple(tensor.shape)}.")
    _check.same_device(query=query, doutput=doutput, output=output, logsumexp=logsumexp, dkey=dkey, dvalue=dvalue)
    tensors = doutput, query, key, value, indices, mask, output, logsumexp, dkey, dvalue
    return _op(*tensors, is_causal, window, position, block_size, scale)
