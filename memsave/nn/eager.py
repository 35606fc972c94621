"""When memsave's own forward may run, under which autocast, and how often its backward can be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def only_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The one tensor that `module` was called with; None where its original forward must see to the call.

    That is so for several inputs, and for weights that are computed at each access (`torch.nn.utils.parametrize`).
    """
    inputs = (*args, *kwargs.values())
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or "parametrizations" in module._modules:
        return None
    return inputs[0]


def plain(x: object) -> bool:
    """Whether a module must run its original forward on `x`: under a compiler, a tracer or functorch.

    A compiler's partitioner decides itself what to recompute, and tracers should record plain operators.
    """
    return (
        torch.compiler.is_compiling()
        or not isinstance(x, Tensor)
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is in force for `x`; torch raises for devices that have none, such as meta."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Run operators on `x` in exactly the dtypes that they are given."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()


def autocast_now(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """Makes the autocast that is in force for `x` now, to run the same operators in the same dtypes later."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False)


def product_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which x and weight are multiplied: autocast's where it applies, else the weight's."""
    if autocast_enabled(x) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results raise an error when they are differentiated, instead of counting as constants.

    torch's decorator of this name lets them pass as constants where the upstream gradient needs no gradient, although
    they depend on the inputs and the weights.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return outputs
        message = (
            b"trying to differentiate twice through a function of memsave, which has first derivatives only; "
            b"restore_model a converted module first"
        )
        stop = torch._C._functions.DelayedError(message, len(outputs))
        return stop(*(None if t is None else t.detach().requires_grad_(True) for t in outputs))  # type: ignore[arg-type]

    return checked
