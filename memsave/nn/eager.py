"""When memsave's own forward may run, and under which autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad


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


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Run operators on `x` in exactly the dtypes that they are given."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def autocast_now(x: Tensor) -> Callable[[], AbstractContextManager[object]]:
    """Makes the autocast that is in force for `x` now, to run the same operators in the same dtypes later."""
    device = x.device.type
    enabled = torch.is_autocast_enabled(device)
    return partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled=enabled, cache_enabled=False)
