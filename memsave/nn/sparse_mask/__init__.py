"""Sparse masks of a weight matrix: how they are chosen, written, compared and fused.

A mask of a matrix with R rows and C columns is `indices`: (K,) int32, strictly ascending flat positions r * C + c. A
sparse delta is a mask with values (K,). `elias_fano.py` is the code in which masks are stored.
"""

from .calibration import gradient_masks
from .fusion import fuse
from .overlap import awom, awor
from .random import random_indices
from .selection import largest, struct_indices

__all__ = [
    "awom",
    "awor",
    "fuse",
    "gradient_masks",
    "largest",
    "random_indices",
    "struct_indices",
]
