"""Product quantization: which codeword of each subspace is nearest to each key.

B sequences, H heads, S keys of D = M * d features, M subspaces of d features, C codewords in each. Jégou et al. 2011,
"Product quantization for nearest neighbor search".
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

MAX_CODEWORDS, MAX_SUBSPACES, MAX_FEATURES = 16, 64, 128

_op = register(
    "pq_encode(Tensor x, Tensor codebook) -> Tensor",
    fake=lambda x, codebook: x.new_empty((*x.shape[:2], (codebook.shape[1] + 1) // 2, x.shape[2]), dtype=torch.uint8),
    reference=reference,
    kernels=("native", "triton"),
)


def pq_encode(x: Tensor, codebook: Tensor) -> Tensor:
    """code[m, s] = argmin over c of |x[s, m] - codebook[m, c]|, in float32; of several nearest ones the first.

    Args:
        x: (B, H, S, D) floating point, any strides.
        codebook: (H, M, C, d) float32 with M * d = D, C <= 16, M <= 64, d <= 128.

    Returns:
        (B, H, ceil(M / 2), S) uint8, contiguous: subspace 2 p in the low four bits of row p, 2 p + 1 in the high ones.

    Raises:
        ValueError: a tensor of another shape or dtype, sizes above these, tensors on two devices.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 4)
    check_codebook("x", x, codebook)
    return _op(x, codebook)


def check_codebook(name: str, x: Tensor, codebook: Tensor) -> None:
    """Raises ValueError where `codebook` (H, M, C, d) does not fit x (B, H, R, D)."""
    _check.typed("codebook", codebook, torch.float32, 4)
    heads, subspaces, codewords, features = codebook.shape
    if x.shape[1] != heads or x.shape[3] != subspaces * features:
        raise ValueError(
            f"codebook must be (H, M, C, d) with the H = {x.shape[1]} heads of {name} and M * d = {x.shape[3]}, its "
            f"head size; got {tuple(codebook.shape)}."
        )
    small = 1 <= codewords <= MAX_CODEWORDS and 1 <= subspaces <= MAX_SUBSPACES and 1 <= features <= MAX_FEATURES
    if not small:
        raise ValueError(
            f"codebook must have 1 to {MAX_CODEWORDS} codewords, 1 to {MAX_SUBSPACES} subspaces and 1 to "
            f"{MAX_FEATURES} features in each; got (H, M, C, d) = {tuple(codebook.shape)}."
        )
    _check.same_device(**{name: x, "codebook": codebook})
