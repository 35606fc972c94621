"""For code that must see a planned module's own forward, and nothing around it."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from .fingerprint import SET_BY_LIBRARIES, same

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_COLLECTING = "output_capturing_hook"  # transformers' hooks, which do nothing until somebody asks for their outputs
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


@contextmanager
def untouched(module: nn.Module) -> Iterator[list[str]]:
    """Within it, no module in `module` has hooks, but for transformers' own: they are not for planning, whose tensors
    have no values. Afterwards all attributes are what they were; the list then names those that were not."""
    before = [(name, m.__dict__, dict(m.__dict__)) for name, m in module.named_modules()]
    contents = [(v, copy.copy(v)) for _, _, old in before for v in old.values() if type(v) in (list, dict, set)]
    changed: list[str] = []
    try:
        for _, attributes, _ in before:
            attributes.update({hooks: _collecting(attributes[hooks]) for hooks in _HOOKS})
        yield changed
    finally:
        for name, attributes, old in before:
            attributes.update({hooks: old[hooks] for hooks in _HOOKS})
            if not same(attributes, old):
                keys = [k for k in (*attributes, *old) if not same(attributes.get(k, before), old.get(k, before))]
                changed += [f"{name}.{key}".lstrip(".") for key in keys if key not in SET_BY_LIBRARIES]
                attributes.clear()
                attributes.update(old)
        for value, content in contents:
            if not same(value, content):
                changed.append(f"a {type(value).__name__}")
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)


def is_collecting(hook: Any) -> bool:
    """Whether it is a hook by which transformers' forwards collect what modules within return."""
    return getattr(hook, "__name__", "") == _COLLECTING


def _collecting(hooks: Mapping[int, Any]) -> OrderedDict[int, Any]:
    return OrderedDict((key, hook) for key, hook in hooks.items() if is_collecting(hook))
