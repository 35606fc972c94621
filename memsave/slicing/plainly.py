"""A switch for code that must see a planned module's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_plainly: ContextVar[bool] = ContextVar("memsave_plainly", default=False)


@contextmanager
def running_plainly() -> Iterator[None]:
    """Within it, planned modules run their own forward, and do not count it."""
    token = _plainly.set(True)
    try:
        yield
    finally:
        _plainly.reset(token)


def runs_plainly() -> bool:
    return _plainly.get()
