"""Multiplies by a factor where a packed bit is set, and by 0 elsewhere: dropout with a given mask, and its gradient.

N rows, D features, B = ceil(D / 8) bytes per row, packed as `pack_bits` packs.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "masked_scale(Tensor x, Tensor bits, float scale) -> Tensor",
    fake=lambda x, bits, scale: x.new_empty(x.shape),
    reference=reference,
    kernels=("native", "triton"),
)


def masked_scale(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    """y = x * (scale where the bit is set, else 0), in float32 (float64 for float64 x), rounded once to the dtype of x.

    It is a product, not a selection: the signs of zeros stay, and NaN and infinity times 0 are NaN.

    Args:
        x: (N, D) floating point, any strides.
        bits: (N, B) uint8, as `pack_bits` gives them, any strides.
        scale: the factor, finite and not below 0; it is rounded to the dtype of the product first.

    Returns:
        (N, D), contiguous, dtype of x.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, a scale out of range.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    _check.typed("bits", bits, torch.uint8, 2)
    if bits.shape != (x.shape[0], (x.shape[1] + 7) // 8):
        raise ValueError(
            f"bits must have one bit for each element of x {tuple(x.shape)}, and each row its own bytes: "
            f"expected {(x.shape[0], (x.shape[1] + 7) // 8)}, got {tuple(bits.shape)}."
        )
    if not 0 <= scale < inf:
        raise ValueError(f"scale must be a finite factor, not below 0; got {scale}.")
    _check.same_device(x=x, bits=bits)
    return _op(x, bits, scale)
