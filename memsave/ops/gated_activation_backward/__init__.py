"""The gradients of act(gate) * up from both inputs.

N rows, F features. dgate = dh * up * act'(gate), dup = dh * act(gate), element by element.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..activation import check_kind
from . import reference

_op = register(
    "gated_activation_backward(Tensor dh, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)",
    fake=lambda dh, gate, up, kind: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    reference=reference,
    kernels=("native", "triton"),
)


def gated_activation_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """dgate and dup.

    Args:
        dh: (N, F), any strides, dtype of gate: the gradient of `gated_activation`'s result.
        gate: (N, F) floating point, any strides.
        up: (N, F), any strides, dtype of gate.
        kind: an `Activation`.

    Returns:
        dgate, dup: (N, F), contiguous, dtype of gate.

    Raises:
        ValueError: tensors of different shapes or dtypes or on several devices, an unknown kind.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("gate", gate, 2)
    _check.alike(gate=gate, up=up, dh=dh)
    check_kind(kind)
    return _op(dh, gate, up, int(kind))
