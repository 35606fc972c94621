"""Plain PyTorch implementation of `gated_activation_backward`.

N rows, F features. It takes tensors of any number of dimensions.
"""

from __future__ import annotations

from torch import Tensor

from ..activation import reference
from ..activation_backward import reference as backward_reference


def gated_activation_backward(dh: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    dup = reference.activation(gate, kind).mul_(dh)
    dactivation = reference.row_major(dh) * up
    return backward_reference.activation_backward(dactivation, gate, kind), dup


def workspace_bytes(dh: Tensor, gate: Tensor, up: Tensor, kind: int) -> int:
    """The larger of two moments: the activation, before dgate is there, and its gradient, beside the product."""
    each = gate.numel() * gate.element_size()
    product = each + backward_reference.workspace_bytes(gate.new_empty(gate.shape), gate, kind)
    copy = each + reference.row_major_bytes(dh) - each
    return max(reference.workspace_bytes(gate, kind) - each, product, copy)
