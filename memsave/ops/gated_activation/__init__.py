"""The product in the middle of a gated MLP (SwiGLU, GeGLU), act(gate) * up.

N rows, F features. Shazeer 2020, arXiv 2002.05202.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..activation import check_kind
from . import reference

_op = register(
    "gated_activation(Tensor gate, Tensor up, int kind) -> Tensor",
    fake=lambda gate, up, kind: gate.new_empty(gate.shape),
    reference=reference,
    kernels=("native", "triton"),
)


def gated_activation(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """h = act(gate) * up. Half types round act(gate) before it is multiplied, as plain PyTorch does.

    Args:
        gate: (N, F) floating point, any strides.
        up: (N, F), any strides, dtype of gate.
        kind: an `Activation`.

    Returns:
        (N, F), contiguous, dtype of gate.

    Raises:
        ValueError: tensors of different shapes or dtypes or on several devices, an unknown kind.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("gate", gate, 2)
    _check.alike(gate=gate, up=up)
    check_kind(kind)
    return _op(gate, up, int(kind))
