"""Which rows the case table of an op lacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .case import OpCase, OpSpec

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64),
)


def missing_rows(spec: OpSpec, function: Callable[..., Any], cases: Sequence[OpCase]) -> list[str]:
    """What no row of an op has, in words: an odd shape, no elements, tensors that are not contiguous, a dtype.

    Args:
        function: the public function; it raises ValueError for what the op does not take. It gets meta tensors.
        cases: the rows of this op.
    """
    rows = [case.make() for case in cases]
    if not rows:
        return ["any row"]
    missing = []
    if not any(_is_odd(args, spec.fixed) for args in rows):
        missing.append("a row where every size is odd")
    if not any(not t.numel() for args in rows for t in _tensors(args).values()):
        if spec.takes_empty or not _refuses_empty(function, rows[0]):
            missing.append("a row with an empty tensor")
    fullest = max(rows, key=lambda args: len(_tensors(args)))
    for i, tensor in _tensors(fullest).items():
        same_place = [args[i] for args in rows if isinstance(args[i], Tensor)]
        if tensor.ndim and all(t.is_contiguous() for t in same_place):
            if not _refuses_gaps(function, fullest, i):
                missing.append(f"a row where argument {i} is not contiguous")
        accepted = accepted_dtypes(function, fullest, i)
        missing += [f"a row where argument {i} is {d}" for d in accepted if all(t.dtype != d for t in same_place)]
    return missing


def accepted_dtypes(function: Callable[..., Any], args: tuple[Any, ...], position: int) -> list[torch.dtype]:
    """The dtypes that one argument may have; others that share its dtype in `args` may have to follow it."""
    meta = _on_meta(args)
    sharing = [i for i, t in _tensors(args).items() if i != position and t.dtype == args[position].dtype]
    groups = [(position, *chosen) for n in range(len(sharing) + 1) for chosen in combinations(sharing, n)]

    def accepts(dtype: torch.dtype, group: tuple[int, ...]) -> bool:
        try:
            function(*(a.to(dtype) if i in group else a for i, a in enumerate(meta)))
        except ValueError:
            return False
        return True

    return [dtype for dtype in DTYPES if any(accepts(dtype, group) for group in groups)]


def _on_meta(args: tuple[Any, ...]) -> list[Any]:
    return [a.to("meta") if isinstance(a, Tensor) else a for a in args]


def _tensors(args: tuple[Any, ...]) -> dict[int, Tensor]:
    return {i: a for i, a in enumerate(args) if isinstance(a, Tensor)}


def _is_odd(args: tuple[Any, ...], fixed: tuple[int, ...]) -> bool:
    sizes = [size for tensor in _tensors(args).values() for size in tensor.shape if size not in fixed]
    return all(size % 2 for size in sizes) and max(sizes, default=0) >= 3


def _refuses_gaps(function: Callable[..., Any], args: tuple[Any, ...], position: int) -> bool:
    """Whether the function takes an argument as it is, but not with gaps in memory."""
    meta = _on_meta(args)
    function(*meta)
    meta[position] = torch.stack((meta[position], meta[position]), -1)[..., 0]
    try:
        function(*meta)
    except ValueError:
        return True
    return False


def _refuses_empty(function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    first = next(iter(_tensors(args)))
    try:
        function(*(a[:0] if i == first else a for i, a in enumerate(_on_meta(args))))
    except ValueError:
        return True
    return False
