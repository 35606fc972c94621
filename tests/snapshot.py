"""Everything about a model that a conversion could change by mistake, as plain data that compares by value."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Objects, classes, attributes, hooks, flags and bits of `model`, by qualified name; equal if nothing changed."""
    return {
        "modules": {name: _module(module) for name, module in model.named_modules(remove_duplicate=False)},
        "parameters": {name: _tensor(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {name: _tensor(b) for name, b in model.named_buffers(remove_duplicate=False)},
        "keys": list(model.state_dict()),
    }


def _module(module: nn.Module) -> dict[str, Any]:
    return {
        "id": id(module),
        "class": type(module),
        "attributes": list(module.__dict__),
        "plain": {k: repr(v) for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str, tuple))},
        "converted by": list(module.__dict__.get("_memsave", {}).items()),
        "parts": dict(module.__dict__.get("_memsave_parts", {})),
        "hooks": {kind: [(key, id(hook)) for key, hook in getattr(module, kind).items()] for kind in _HOOKS},
        "children": [(name, id(child)) for name, child in module._modules.items()],
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    grad = tensor.grad if tensor.is_leaf else None
    return {
        "id": id(tensor),
        "requires_grad": tensor.requires_grad,
        "version": tensor._version,
        "bits": bits(tensor),
        "grad": None if grad is None else (id(grad), bits(grad)),
    }


def bits(tensor: Tensor) -> bytes | str:
    """The tensor's dtype, shape and values; without values where it has none."""
    if is_lazy(tensor):
        return type(tensor).__name__
    head = f"{tensor.dtype} {list(tensor.shape)} {tensor.device}"
    if tensor.is_meta:
        return head
    return head.encode() + bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
