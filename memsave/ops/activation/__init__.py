"""An activation function on the rows of a matrix.

N rows, F features. y = act(x), element by element.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from . import reference
from .kind import Activation

__all__ = ["Activation", "activation", "check_kind"]

_op = register(
    "activation(Tensor x, int kind) -> Tensor",
    fake=lambda x, kind: x.new_empty(x.shape),
    reference=reference,
    kernels=("native",),
)


_NUMBERS = frozenset(map(int, Activation))


def check_kind(kind: int) -> None:
    """Raises ValueError for a number that is no `Activation`."""
    if kind not in _NUMBERS:
        raise ValueError(f"kind must be one of {', '.join(f'{a.name} ({a:d})' for a in Activation)}; got {kind!r}.")


def activation(x: Tensor, kind: int) -> Tensor:
    """act(x); on the CPU the same bits as torch's own operator, where it has one.

    Args:
        x: (N, F) floating point, any strides.
        kind: an `Activation`.

    Returns:
        (N, F), contiguous, dtype of x. Half types are computed in float32; RELU_SQUARED is rounded as torch does.

    Raises:
        ValueError: x of another dtype or number of dimensions, an unknown kind.
        RuntimeError: x requires grad while grad mode is on.
    """
    _check.floating("x", x, 2)
    check_kind(kind)
    return _op(x, int(kind))
