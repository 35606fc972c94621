"""Recognizing which activation function a module or a function computes.

A module is recognized by what its forward does with numbers, not by its class, so that every library's GELU counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.activation import Activation
from ..ops.activation.reference import activation
from .converted import original_class
from .probing import own_attributes, takes_one_input

_NAMED = re.compile("gelu|silu|swish|mish|relu|activation", re.IGNORECASE)
_kinds: dict[tuple[object, ...], Activation | None] = {}


def activation_of(module: nn.Module) -> Activation | None:
    """Which activation function the module's original forward computes, found by running it on a grid of numbers.

    None where no known function agrees, and for modules that have parameters, buffers or children, take several inputs,
    or have a class whose name names no activation function. The verdict is remembered for modules of one class with
    equal attributes. The module and torch's random state are not touched.
    """
    cls = original_class(module)
    if module._parameters or module._buffers or module._modules or not _NAMED.search(cls.__name__):
        return None
    if not takes_one_input(cls.forward):
        return None
    own = own_attributes(module)
    if own is None:
        return _probe(module, cls.forward)
    if (cls, own) not in _kinds:
        _kinds[cls, own] = _probe(module, cls.forward)
    return _kinds[cls, own]


def activation_of_function(function: Callable[..., Any] | str, kwargs: Mapping[str, Any]) -> Activation | None:
    """Which activation function a function (or a tensor method's name) called with these keywords computes, or None."""
    if function is F.gelu:
        return Activation.GELU_TANH if kwargs.get("approximate", "none") == "tanh" else Activation.GELU
    return _FUNCTIONS.get(function)


_FUNCTIONS: dict[object, Activation] = {
    F.silu: Activation.SILU,
    F.mish: Activation.MISH,
    F.relu: Activation.RELU,
    torch.relu: Activation.RELU,
    "relu": Activation.RELU,
}


@torch.no_grad()
def _probe(module: nn.Module, forward: Callable[..., Any]) -> Activation | None:
    """Compare `forward` with every known function: in fp64 nearly to the last bit, in bf16 roughly."""
    with _disable_current_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        ends = torch.tensor([-300.0, -60.0, -20.0, 20.0, 60.0, 300.0], dtype=torch.float64)
        grid = torch.cat([torch.linspace(-12, 12, 58, dtype=torch.float64), ends]).view(4, 16)
        outputs = [_output(module, forward, grid.to(dtype)) for dtype in (torch.float64, torch.bfloat16)]
        fitting = (kind for kind in Activation if all(_agrees(y, grid, kind) for y in outputs))
        return next(fitting, None)


def _output(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor | None:
    try:
        y = forward(module, x.clone())
    except Exception:  # a forward of another kind may fail in any way on this input: then it is none of these
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype else None


def _agrees(y: Tensor | None, grid: Tensor, kind: Activation) -> bool:
    if y is None:
        return False
    expected = activation(grid.to(y.dtype).double(), kind)
    tolerance = 1e-9 if y.dtype == torch.float64 else 8 * torch.finfo(y.dtype).eps
    return bool(((y.double() - expected).abs() <= tolerance * (grid.abs() + expected.abs())).all())
