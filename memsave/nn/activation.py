"""Activation functions that keep their input alone, and attach notes to what they return.

x, gate, up and the results are (..., F), N rows. Kept for backward: x, or gate and up. Which function a module computes
is found in `activation_kind.py`; the mathematics is in `ops/activation` and its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import ops
from ..ops.activation import Activation
from ..ops.activation import reference as activation_reference
from ..ops.activation_backward import reference as activation_backward_reference
from ..ops.gated_activation import reference as gated_reference
from ..ops.gated_activation_backward import reference as gated_backward_reference
from . import note
from .converted import Converted
from .eager import no_autocast, once_differentiable, only_input, plain
from .matrix import as_matrix, in_shape


def activate(x: Tensor, kind: Activation, *, noted: bool = True) -> Tensor:
    """act(x) for x (..., F), in its dtype also under autocast; keeps x for backward, attaches a note if `noted`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _activation(x, kind)
    y = _OF_TORCH[kind](x) if kind in _OF_TORCH else _Activation.apply(x, kind)
    if noted:
        note.attach(y, note.Recipe(partial(_activation, kind=kind), per_row=(True,)), (x.detach(),))
    return y


def gated(gate: Tensor, up: Tensor, kind: Activation, *, noted: bool = True) -> Tensor:
    """act(gate) * up, all (..., F), of one dtype; keeps gate and up for backward, attaches a note if `noted`."""
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return _gated(gate, up, kind)
    h = _Gated.apply(gate, up, kind)
    if noted:
        recipe = note.Recipe(partial(_gated, kind=kind), per_row=(True, True))
        note.attach(h, recipe, (gate.detach(), up.detach()))
    return h


def _on_rows(op: Callable[..., Any], reference: Callable[..., Any], kind: int, *tensors: Tensor) -> Any:
    """`op` on tensors (..., F) as rows (N, F); a DTensor knows torch's operators only, so it gets the reference."""
    first = tensors[0]
    with no_autocast(first):
        if any(map(is_traceable_wrapper_subclass, tensors)):
            return reference(*tensors, kind)
        results = op(*map(as_matrix, tensors), kind)
    restore = partial(in_shape, shape=first.shape)
    return tuple(map(restore, results)) if isinstance(results, tuple) else restore(results)


# Torch's own operators, where they keep x alone and no kernel is faster: their backward runs without Python.
_OF_TORCH: dict[Activation, Callable[[Tensor], Tensor]] = {Activation.SILU: F.silu, Activation.GELU: F.gelu}


def _activation(x: Tensor, kind: Activation) -> Tensor:
    with torch.no_grad():
        if kind in _OF_TORCH:
            return _OF_TORCH[kind](x)
        return _on_rows(ops.activation, activation_reference.activation, kind, x)


def _gated(gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
    with torch.no_grad():
        return _on_rows(ops.gated_activation, gated_reference.gated_activation, kind, gate, up)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: Activation) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(x)
        return _activation(x, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        reference = activation_backward_reference.activation_backward
        return _on_rows(ops.activation_backward, reference, ctx.kind, dy, *ctx.saved_tensors), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: Activation) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(gate, up)
        return _gated(gate, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        reference = gated_backward_reference.gated_activation_backward
        dgate, dup = _on_rows(ops.gated_activation_backward, reference, ctx.kind, dh, *ctx.saved_tensors)
        return dgate, dup, None


class ConvertedActivation(Converted):
    """A module that computes a known activation function: the part "activation" says which."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or plain(x) or not x.is_floating_point() or not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return activate(x, self._memsave_parts["activation"])

    def reference(self, x: Tensor) -> Tensor:
        """The original forward."""
        return super().forward(x)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """N * F elements: the input."""
        return prod(input_shape) * dtype.itemsize
