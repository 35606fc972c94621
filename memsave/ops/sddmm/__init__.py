"""Some entries of the product of two dense matrices: a sampled dense-dense matrix multiplication (SDDMM).

N tokens, an R x C matrix of which K entries are wanted. With a = dy and b = x it is the gradient of the masked entries
of a linear layer's weight; the rest of that gradient is never there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

MAX_ELEMENTS = 2**31 - 1

_op = register(
    "sddmm(Tensor a, Tensor b, Tensor indices) -> Tensor",
    fake=lambda a, b, indices: a.new_empty(indices.shape),
    reference=reference,
    kernels=("native", "triton"),
)


def sddmm(a: Tensor, b: Tensor, indices: Tensor) -> Tensor:
    """out[j] = sum over n of a[n, r_j] * b[n, c_j], accumulated at least in float32 and rounded once.

    Args:
        a: (N, R) floating point, any strides.
        b: (N, C) dtype of a, any strides. R * C is at most 2^31 - 1.
        indices: (K,) int32, strictly ascending: r * C + c of each entry.

    Returns:
        (K,), contiguous, dtype of a.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, R * C above 2^31 - 1.
        IndexError: an index outside [0, R * C) or not above the one before, on the CPU; on CUDA, undefined values.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("a", a, 2)
    _check.typed("b", b, a.dtype, 2)
    _check.typed("indices", indices, torch.int32, 1)
    _check.length("b", b, a.shape[0], "rows of a")
    _check.same_device(a=a, b=b, indices=indices)
    if a.shape[1] * b.shape[1] > MAX_ELEMENTS:
        raise ValueError(
            f"the matrix may have {MAX_ELEMENTS} elements at most, because indices are int32; got {a.shape[1]} x "
            f"{b.shape[1]}, from a and b."
        )
    return _op(a, b, indices)
