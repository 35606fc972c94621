"""Measuring a real run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .profile import MemoryProfile
from .replay import build_profile
from .saved import check_function
from .tracker import StorageTracker


def measure(fn: Callable[[], object]) -> MemoryProfile:
    """Run `fn()` once, for real, and tell where its memory was.

    Live storages are counted op by op, each once and by its full size, on all devices together. What existed before
    counts if `fn` touches it, or if it is a parameter or buffer of a module that runs, a gradient of one, or in the
    state of an optimizer that steps. The results, gradients and random numbers of `fn` do not change, and nothing is
    kept alive. Fake tensors count as if they were real, if `FakeTensorMode` was entered before `measure`.

    To profile a steady training step, run one step before: optimizer states are made in the first.

    Not seen: what an op allocates and frees inside itself (memsave's own ops declare it), memory outside of torch
    (libraries, the allocator's cache and fragmentation), and bytes kept for backward that another saved-tensors hook
    takes over (see `saved_bytes`): those count in the peak, as "temporary". Functions compiled by `torch.compile` run
    uncompiled while they are measured; `flex_attention`, which always compiles, and `torch.func` transforms raise.

    Args:
        fn: called once, without arguments, for instance one training step. Its result is dropped.

    Returns:
        The profile. On CUDA it also has the peak of torch's own allocator, whose peak statistics are reset for that.

    Raises:
        Whatever `fn` raises; all hooks are removed then as well. RuntimeError in a backward inside `fn`, if a saved
        tensor was modified in place, as without the measurement.
    """
    check_function("measure", fn)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    allocated_bytes = sum(torch.cuda.memory_allocated(device) for device in devices)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    with StorageTracker() as tracker:
        fn()
    allocator_peak_bytes = sum(torch.cuda.max_memory_allocated(device) for device in devices) - allocated_bytes
    return build_profile(
        tracker.existing, tracker.events, allocator_peak_bytes if devices else None, tracker.recomputed
    )
