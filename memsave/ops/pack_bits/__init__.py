"""Packs a mask into one bit per element.

N rows, D features, B = ceil(D / 8) bytes per row. Feature j of a row is bit j % 8 of its byte j // 8, least significant
bit first, as in `numpy.packbits(mask, axis=-1, bitorder="little")`; the bits that fill up a row are 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "pack_bits(Tensor mask) -> Tensor",
    fake=lambda mask: mask.new_empty((mask.shape[0], (mask.shape[1] + 7) // 8), dtype=torch.uint8),
    reference=reference,
    kernels=("native", "triton"),
)


def pack_bits(mask: Tensor) -> Tensor:
    """One bit for each element of the mask; each row begins with a new byte, so that rows can be picked.

    Args:
        mask: (N, D) bool, any strides.

    Returns:
        (N, B) uint8, contiguous.

    Raises:
        ValueError: a mask of another shape or dtype.
    """
    _check.typed("mask", mask, torch.bool, 2)
    return _op(mask)
