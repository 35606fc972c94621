"""Fixtures of the tests of the methods."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from memsave.nn import grad_norms


@pytest.fixture
def fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No gradient norms of another test pending, every warning new, and a warning that is not expected is an error."""
    monkeypatch.setattr(grad_norms, "_pending", [])
    monkeypatch.setattr(grad_norms, "_warned", set())
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sample_cache|.*drawn by")
        yield
