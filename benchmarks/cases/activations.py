"""What the benchmark cases of the activation ops are called with, and what a model does in their place.

N rows, F features (D in the sizes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave import ops
from memsave.ops.activation import Activation
from tests.harness import assert_within_budget

aten = torch.ops.aten
_BACKWARD: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    Activation.SILU: aten.silu_backward,
    Activation.GELU_TANH: lambda dy, x: aten.gelu_backward(dy, x, approximate="tanh"),
}


def activation_inputs(device: str, N: int, D: int, dtype: torch.dtype, activation: str) -> dict[str, Any]:
    """x and dy, or gate, up and dh (N, F); act is act(gate), which a plain model keeps for its backward."""
    generator = torch.Generator(device).manual_seed(0)
    x, up, dy = (torch.randn(N, D, generator=generator, device=device, dtype=dtype) for _ in range(3))
    kind = Activation[activation.upper()]
    return {"x": x, "dy": dy, "gate": x, "up": up, "dh": dy, "act": _function(kind)(x), "kind": int(kind)}


def _function(kind: int) -> Callable[[Tensor], Tensor]:
    return F.silu if kind == Activation.SILU else lambda x: F.gelu(x, approximate="tanh")


def torchs_activation(x: Tensor, kind: int, **_: Any) -> Tensor:
    return _function(kind)(x)


def torchs_backward(dy: Tensor, x: Tensor, kind: int, **_: Any) -> Tensor:
    return _BACKWARD[kind](dy, x)


def written_product(gate: Tensor, up: Tensor, kind: int, **_: Any) -> Tensor:
    return _function(kind)(gate) * up


def kept_backward(dh: Tensor, gate: Tensor, up: Tensor, act: Tensor, kind: int, **_: Any) -> tuple[Tensor, Tensor]:
    """What autograd does for act(gate) * up, with act(gate) kept."""
    return _BACKWARD[kind](dh * up, gate), dh * act


def check_activations(**inputs: Any) -> None:
    """Every op within the error budget."""
    x, dy, up, kind = (inputs[name] for name in ("x", "dy", "up", "kind"))
    names = "activation", "activation_backward", "gated_activation", "gated_activation_backward"
    for name, tensors in zip(names, ((x,), (dy, x), (x, up), (dy, x, up)), strict=True):
        op = getattr(ops, name)
        found = op(*tensors, kind)
        with ops.use_reference():
            plain, exact = op(*tensors, kind), op(*(t.double() for t in tensors), kind)
        results = (found, exact, plain) if isinstance(found, tuple) else ((found,), (exact,), (plain,))
        for f, e, p in zip(*results, strict=True):
            assert_within_budget(f, e, p)
