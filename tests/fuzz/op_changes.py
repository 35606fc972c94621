"""What is done to the arguments of an op: other layouts and values, which it must take, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.cases.ops.inputs import strided
from tests.harness.coverage import DTYPES

from .op_arguments import Draw

# Arguments that must be contiguous, and those whose values must be the rightful owners of their memory.
CONTIGUOUS = {"selected_attention_backward": (8, 9)}
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, -1e-40, 6e4, -7e4, 3e38, -3e38, 1e300)
# Nothing that could be the size of an output that fits into memory.
HUGE = (-1, -(2**31), 2**45, 2**62, 2**63 - 1, -(2**63))


def _sliced(x: Tensor) -> Tensor:
    """Behind and before others in memory, at an odd place."""
    wide = torch.cat((x, x, x), -1)
    return wide[..., x.shape[-1] : 2 * x.shape[-1]]


def _turned(x: Tensor) -> Tensor:
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def _spread(x: Tensor) -> Tensor:
    """With gaps between the rows, and none within."""
    return torch.stack((x, x), 1)[:, 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaps": strided,
    "sliced": _sliced,
    "turned": _turned,
    "spread": _spread,
}


def laid_out(draw: Draw, op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same values in other places."""
    changed = list(args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.ndim and i not in CONTIGUOUS.get(op, ()) and draw(st.booleans()):
            changed[i] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](value)
    return tuple(changed)


def with_special_numbers(draw: Draw, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Some numbers are infinite, not numbers, denormal or huge."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    chosen = draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=4))
    share = draw(st.sampled_from([0.02, 0.3, 1.0]))
    changed = list(args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point() and draw(st.booleans()):
            places = torch.rand(value.shape, generator=generator) < share
            numbers = torch.tensor(chosen, dtype=torch.float64).to(value.dtype)
            picked = numbers[torch.randint(len(chosen), value.shape, generator=generator)]
            changed[i] = torch.where(places, picked, value)
    return tuple(changed)


def with_a_mistake(draw: Draw, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """One argument is of another dtype, shape or device, or has a number out of range; perhaps it is still right."""
    changed = list(args)
    indices = [i for i, value in enumerate(args) if _is_integral(value) and value.numel()]
    i = draw(st.sampled_from([*range(len(args)), *4 * indices]))
    changed[i] = _wrong_tensor(draw, args[i]) if isinstance(args[i], Tensor) else _wrong_number(draw, args[i])
    return tuple(changed)


def _wrong_number(draw: Draw, value: Any) -> Any:
    if value is None:
        return draw(st.sampled_from([None, torch.ones(3)]))
    if isinstance(value, bool):
        return draw(st.booleans() | st.none())
    if isinstance(value, int):
        return draw(st.integers(-3, 70) | st.sampled_from(HUGE))
    return draw(st.sampled_from([0.0, -1.0, float("nan"), float("inf"), 1e308, 1e-320]))


def _wrong_tensor(draw: Draw, value: Tensor) -> Any:
    if _is_integral(value) and value.numel() and draw(st.booleans()):
        return _wrong_values(draw, value)
    how = draw(st.sampled_from(["dtype", "meta", "flat", "deep", "cut", "longer", "flipped"]))
    if how == "dtype":
        return value.to(draw(st.sampled_from(DTYPES)))
    if how == "meta":
        return value.to("meta")
    if how in ("flat", "deep"):
        return value.reshape(-1) if how == "flat" else value[None]
    if how in ("cut", "longer") and value.ndim:
        dim = draw(st.integers(0, value.ndim - 1))
        size = value.shape[dim]
        return value.narrow(dim, 0, size - 1) if how == "cut" and size else torch.cat((value, value), dim)
    return value.flip(-1) if value.ndim else value


def _is_integral(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def _wrong_values(draw: Draw, value: Tensor) -> Tensor:
    """Integers that are out of range, unsorted or there twice."""
    changed = value.contiguous().clone()
    flat = changed.view(-1)
    place, how = draw(st.integers(0, flat.numel() - 1)), draw(st.sampled_from(["set", "copy", "flip"]))
    if how == "set":
        info = torch.iinfo(value.dtype)
        flat[place] = min(max(draw(st.integers(-2, 400) | st.sampled_from(HUGE)), info.min), info.max)
    elif how == "copy":
        flat[place] = flat[draw(st.integers(0, flat.numel() - 1))]
    else:
        changed = changed.flip(-1) if changed.ndim else changed
    return changed
