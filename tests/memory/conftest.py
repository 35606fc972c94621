"""Settings for the tests of this folder."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def small_and_quick() -> Iterator[None]:
    """One thread: the tensors are tiny, a second one only waits. Older objects are set aside: `measure` looks for
    gradients among all objects, which takes most of the time of a tiny measurement once large packages are loaded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
