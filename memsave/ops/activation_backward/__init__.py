"""The gradient of an activation function from its input.

N rows, F features. dx = dy * act'(x), element by element.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..activation import check_kind
from . import reference

_op = register(
    "activation_backward(Tensor dy, Tensor x, int kind) -> Tensor",
    fake=lambda dy, x, kind: x.new_empty(x.shape),
    reference=reference,
    kernels=("native",),
)


def activation_backward(dy: Tensor, x: Tensor, kind: int) -> Tensor:
    """dx = dy * act'(x), computed in float32 for half types.

    Args:
        dy: (N, F), any strides, dtype of x: the gradient of `activation`'s result.
        x: (N, F) floating point, any strides.
        kind: an `Activation`.

    Returns:
        (N, F), contiguous, dtype of x.

    Raises:
        ValueError: tensors of different shapes or dtypes or on several devices, an unknown kind.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    _check.alike(x=x, dy=dy)
    check_kind(kind)
    return _op(dy, x, int(kind))
