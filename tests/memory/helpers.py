"""What the tests of this folder share."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

FLOAT_BYTES = 4


def allocation_peak_bytes(fn: Callable[[], object]) -> int:
    """Peak of the allocator's own events while `fn()` runs; memory from before, and its release, is not in them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes


def hook_state() -> tuple[object, ...]:
    """Everything global that a measurement hooks into, to compare before and after."""
    modules, optimizers = torch.nn.modules.module, importlib.import_module("torch.optim.optimizer")
    return (
        tuple(modules._global_forward_pre_hooks),
        tuple(modules._global_forward_hooks),
        tuple(modules._global_forward_hooks_always_called),
        tuple(optimizers._global_optimizer_pre_hooks),
        tuple(optimizers._global_optimizer_post_hooks),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_dispatch_stack(),
    )
