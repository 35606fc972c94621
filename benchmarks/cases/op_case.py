"""What a benchmark case of an op is, and what makes one: calls side by side, at several sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memsave import ops
from tests.harness import assert_same, assert_within_budget

from .case import Case

Inputs = dict[str, Any]  # by name, as the calls take them


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of the calls that are compared.

    Attributes:
        call: takes the inputs of a size by name; unknown names are to be ignored.
        within: the context it runs in, entered outside of what is timed.
        devices: where it can run.
        may_fail: whether an error leaves it without figures, instead of failing the case.
    """

    name: str
    call: Callable[..., Any]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    devices: tuple[str, ...] = ("cpu", "cuda")
    may_fail: bool = False


@dataclass(frozen=True, kw_only=True)
class Aim:
    """`contender` takes at most `at_most` of the time of `of`, at the sizes of a device."""

    contender: str
    of: str
    at_most: float
    device: str


@dataclass(frozen=True, kw_only=True)
class OpCase(Case):
    """Calls side by side, at several sizes. The first contender is the one that the others are compared with.

    Attributes:
        inputs: makes the inputs: `inputs(device, **size)`.
        contenders: what is called with them.
        check: takes the inputs by name, and raises AssertionError where memsave computes something else.
        sizes: for each device, the sizes as keyword arguments of `inputs`.
    """

    kind: ClassVar[str] = "op"

    inputs: Callable[..., Inputs]
    contenders: tuple[Contender, ...]
    check: Callable[..., None]
    sizes: Mapping[str, tuple[Mapping[str, Any], ...]]
    aim: Aim | None = None

    def describe(self) -> dict[str, Any]:
        aim = {"aim": vars(self.aim)} if self.aim else {}
        return super().describe() | {"first": self.contenders[0].name} | aim


def for_op(
    op: str,
    peers: Mapping[str, Callable[..., Any]],
    plain: Callable[..., Tensor] | None = None,
    kernels: bool = True,
    check: Callable[..., None] | None = None,
    writes: str | None = None,
    **fields: Any,
) -> OpCase:
    """A case of one op: plain PyTorch (its reference), memsave (the backend that is active) and peers.

    Args:
        kernels: whether the op has kernels; without, plain PyTorch is all there is of it.
        peers: what a user would write instead.
        plain: for an op that rounds, what it computes as one would write it: its error sets the budget, and in fp64 it
            is the truth. Without it, memsave must give the same bits as its reference.
        check: in place of both.
        writes: the input that the op overwrites: each call gets a copy of it.
    """
    function = getattr(ops, op)
    parameters = list(inspect.signature(function).parameters)

    def call(**inputs: Any) -> Any:
        if writes is not None:
            inputs[writes] = inputs[writes].clone()
        result = function(*(inputs[name] for name in parameters))
        return result if writes is None else inputs[writes]

    def same_result(**inputs: Any) -> None:
        if plain is not None:
            assert_within_budget(call(**inputs), plain(**in_fp64(inputs)), plain(**inputs))
            return
        torch.manual_seed(0)
        found = call(**inputs)
        torch.manual_seed(0)
        with ops.use_reference():
            assert_same(found, call(**inputs))

    contenders = (
        Contender(name="plain PyTorch", call=call, within=ops.use_reference),
        *([Contender(name="memsave", call=call)] if kernels else []),
        *(Contender(name=name, call=peer) for name, peer in peers.items()),
    )
    check = check or same_result
    return OpCase(name=f"op_{op}", contenders=contenders, check=check, devices=("cpu", "cuda"), **fields)


def in_fp64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    floating = {name for name, i in inputs.items() if isinstance(i, Tensor) and i.is_floating_point()}
    return {name: value.double() if name in floating else value for name, value in inputs.items()}


def sizes(*names: str) -> Callable[..., tuple[dict[str, Any], ...]]:
    """Makes sizes of tuples: `sizes("N", "D")((2, 3), (4, 5))`."""
    return lambda *rows: tuple(dict(zip(names, row, strict=True)) for row in rows)
