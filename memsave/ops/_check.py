"""Checks of arguments, shared by the public functions of the ops. Each raises ValueError with what was given."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_ROWS = 2**31 - 1


def _given(tensor: Tensor) -> str:
    return f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def floating(name: str, tensor: Tensor, ndim: int) -> None:
    if tensor.dtype not in FLOATS or tensor.ndim != ndim:
        raise ValueError(f"{name} must be a {ndim}-D float16, bfloat16, float32 or float64 tensor; {_given(tensor)}.")


def typed(name: str, tensor: Tensor, dtype: torch.dtype, ndim: int) -> None:
    if tensor.dtype != dtype or tensor.ndim != ndim:
        raise ValueError(f"{name} must be a {ndim}-D {dtype} tensor; {_given(tensor)}.")


def length(name: str, tensor: Tensor, expected: int, of: str) -> None:
    if tensor.shape[0] != expected:
        raise ValueError(f"{name} must have one entry for each of the {expected} {of}; {_given(tensor)}.")


def alike(**tensors: Tensor) -> None:
    """All tensors have the shape, dtype and device of the first."""
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name} must have the shape and dtype of {first_name}, {tuple(first.shape)} and {first.dtype}; "
                f"{_given(tensor)}."
            )
    same_device(**tensors)


def same_device(**tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; got {given}.")


def normalized(dy: Tensor, x: Tensor, rstd: Tensor) -> None:
    """x (N, D) of a norm, dy like it, and rstd (N,), float32 or float64."""
    floating("x", x, 2)
    floating("dy", dy, 2)
    if dy.shape != x.shape:
        raise ValueError(f"dy must have the shape of x, {tuple(x.shape)}; got {tuple(dy.shape)}.")
    typed("rstd", rstd, torch.float64 if rstd.dtype == torch.float64 else torch.float32, 1)
    length("rstd", rstd, x.shape[0], "rows of x")


def kept_rows(k: int, n: int) -> None:
    if n > MAX_ROWS:
        raise ValueError(f"at most {MAX_ROWS} rows can be drawn from, because rows are int32; got {n}.")
    if not 1 <= k < n:
        raise ValueError(f"k must be in [1, N - 1] for N = {n} rows; got {k}. To keep all rows, do not draw.")
