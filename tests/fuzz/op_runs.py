"""What runs of an op must give, in the process that may be ended by it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memsave import ops
from memsave.ops import _native
from tests.cases.ops import SPECS
from tests.harness import OpCase, as_tuple, check, has_kernel, implementation

SLACK = 64.0
"""In units of rounding; gross mistakes are looked for here, small ones by the rows of the tables."""
REFUSALS = (ValueError, IndexError, TypeError, RuntimeError, NotImplementedError)


LIBRARY = "MEMSAVE_FUZZ_LIBRARY"
"""The variable that names another build of the C++ kernels, one with sanitizers, to be run alone."""
if LIBRARY in os.environ:
    _native.LIBRARY_PATH = Path(os.environ[LIBRARY])


def backends(op: str) -> list[str]:
    native = _native.library() is not None and has_kernel(op, "native")
    return ["reference", *["native"] * native]


def right(op: str, args: tuple[Any, ...], finite: bool) -> None:
    """Every implementation gives the right values, and writes nothing but its outputs.

    Args:
        finite: whether the numbers are such that an error against float64 can be told.
    """
    if LIBRARY in os.environ:  # without guards: the sanitizer must see what is beyond the tensors
        if has_kernel(op, "native"):
            implementation(op, "native")(*map(_copied, args))
        return
    spec = SPECS[op]
    compared = spec.exact is True and finite is False and op in _EXACT_FOR_ALL
    spec = replace(spec, slack=SLACK) if finite or compared else replace(spec, oracle=None)
    for backend in backends(op):
        case = OpCase(spec, f"fuzz on {backend}", lambda: tuple(_copied(a) for a in args))
        check(case, implementation(op, backend), deterministic=(False,))


_STRICTER = {"selected_attention", "selected_attention_backward"}
"""Lists of keys that are not ascending are undefined; the kernels refuse them, which plain PyTorch does not."""
_EXACT_FOR_ALL = {"gather_rows", "masked_scale", "row_inclusion", "draw_winners", "pack_bits"}


def _copied(value: Any) -> Any:
    """The same, in memory of its own, so that an op that writes does so each time anew."""
    if not isinstance(value, Tensor):
        return value
    copied = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    once = tuple(slice(1) if stride == 0 else slice(None) for stride in value.stride())
    copied[once].copy_(value[once])
    return copied


def right_or_refused(op: str, args: tuple[Any, ...]) -> None:
    """Every implementation refuses with an exception of a sensible class, or gives outputs of one shape and dtype."""
    given: dict[str, Any] = {}
    for backend in backends(op):
        with ops.use_backend(backend):
            given[backend] = _outcome(getattr(ops, op), tuple(_copied(a) for a in args))
    if len(given) == 2:
        ours, plain = given["native"], given["reference"]
        if op in _STRICTER and ours == "refused":
            return
        assert ours == plain, f"{op}: native {ours}, reference {plain}"


def _outcome(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """ "refused", or the shapes and dtypes of what is returned."""
    try:
        outputs = as_tuple(function(*args))
    except REFUSALS as error:
        assert str(error), f"{type(error).__name__} without a message"
        return "refused"
    return [(tuple(y.shape), y.dtype) for y in outputs]
