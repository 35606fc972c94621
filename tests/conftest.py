"""Fixtures of the tests of the rewriter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from torch import nn

from .snapshot import snapshot

# How long an example takes says more about the machine than about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def unchanged() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Remembers models; at the end of the test each must be as it was."""
    seen: list[tuple[nn.Module, dict[str, Any]]] = []

    def remember(model: nn.Module) -> nn.Module:
        seen.append((model, snapshot(model)))
        return model

    yield remember
    assert seen
    for model, before in seen:
        assert snapshot(model) == before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is a whole process for minutes comes first: at the end, the other workers would wait for it."""
    items.sort(key=lambda item: "test_interpreted.py" not in item.nodeid)
