"""What an op allocates inside itself on the CPU, from the raw allocation events of torch.profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.harness import as_tuple


def peak_inside_bytes(call: Callable[[], Any]) -> int:
    """Peak of the bytes allocated during `call`, beyond those of the tensors that it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        outputs = call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    tensors = as_tuple(outputs)
    returned = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert live >= returned, "the profiler missed an allocation of the op"
    return peak - returned
