"""A block that keeps only its input: backward runs its forward again, over chunks of rows.

x is (..., D), N rows; y (..., O). The block must work row by row, unless it is run as one chunk. Beyond x, or what the
note of x needs, nothing is kept; backward has a chunk's intermediate tensors at a time. Like activation checkpointing
(Chen et al. 2016, arXiv 1604.06174), but the input itself is recomputed by its note, temporary bytes do not grow
with N, and the parameters' gradients leave through the Function's own outputs, so that DDP and FSDP see them as usual.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import note as notes
from .eager import autocast_now, once_differentiable
from .note import Recipe


class Work(NamedTuple):
    """How a block is run, and run again.

    Attributes:
        block: from x (C, D), or (..., D) where there is one chunk, to y (C, O) or (..., O).
        rerun: the same in backward, given a seed or None; only the gradient of its y counts.
        parameters: gives what it reads now.
        num_chunks: 1 for a block that does not work row by row.
        replay: whether it draws random numbers in forward, which must be the same when it is run again.
    """

    block: Callable[[Tensor], Tensor]
    rerun: Callable[[Tensor, Tensor | None], Tensor]
    parameters: Callable[[], Sequence[Tensor]]
    num_chunks: int = 1
    replay: bool = False


def run_in_chunks(block: Callable[[Tensor], Tensor], x: Tensor, num_chunks: int) -> Tensor:
    """The block's output (..., O) for x (..., D), chunk by chunk; call it without gradients."""
    if num_chunks == 1:
        return block(x)
    flat = x.reshape(-1, x.shape[-1])  # (N, D)
    y: Tensor | None = None
    for rows in chunks_of(flat.shape[0], num_chunks):
        part = block(flat[rows])  # (C, O)
        if y is None:
            y = part.new_empty((flat.shape[0], part.shape[-1]))
        y[rows] = part
        del part
    assert y is not None
    return y.view(*x.shape[:-1], y.shape[-1])


def chunks_of(num_rows: int, num_chunks: int) -> Iterator[slice]:
    """Slices of about equal length that cover all rows: one, though empty, where there is no row."""
    size = max(1, -(-num_rows // num_chunks))
    return (slice(start, min(start + size, num_rows)) for start in range(0, max(num_rows, 1), size))


def recomputed(work: Work, x: Tensor, seed: Tensor | None) -> Tensor:
    """The block's output for x (..., D), keeping x alone, or nothing where a note can make x again."""
    note = notes.find(x)
    source = note.tensors if note is not None else (x.detach(),)
    states = _random_states(x) if work.replay else ()
    kept = (*source, *states, *(() if seed is None else (seed,)))
    recipe = note.recipe if note is not None else None
    layout = _Layout(len(source), len(states), seed is not None)
    return _Recomputed.apply(x, work, recipe, layout, *kept, *work.parameters())


class _Layout(NamedTuple):
    """How many of the kept tensors are of which kind."""

    num_source: int
    num_states: int
    has_seed: bool

    def split(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
        """What makes x, random states, the seed; the parameters follow."""
        states_end = self.num_source + self.num_states
        return (
            tensors[: self.num_source],
            tensors[self.num_source : states_end],
            tensors[states_end] if self.has_seed else None,
        )

    @property
    def num_kept(self) -> int:
        return self.num_source + self.num_states + self.has_seed


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, work: Work, recipe: Recipe | None, layout: _Layout, *kept_and_parameters: Tensor
    ) -> Tensor:
        parameters = kept_and_parameters[layout.num_kept :]
        ctx.work, ctx.recipe, ctx.layout, ctx.autocast = work, recipe, layout, autocast_now(x)
        ctx.shape = x.shape
        # The parameters themselves, to learn of changes in place; which objects they are, to learn of other changes.
        ctx.save_for_backward(*kept_and_parameters)
        ctx.parameters = [weakref.ref(p) for p in parameters]
        return run_in_chunks(work.block, x, work.num_chunks).detach()  # no view: it may be modified in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        source, states, seed = ctx.layout.split(tensors)
        parameters = _unchanged(ctx.work.parameters(), ctx.parameters)
        offset = 4 + ctx.layout.num_kept
        trained = [p for i, p in enumerate(parameters) if ctx.needs_input_grad[offset + i]]
        sums = _Sums(ctx, trained)
        dy = dy.reshape(-1, dy.shape[-1])  # (N, O)
        with ctx.autocast(), _replayed(states, dy):
            for number, rows in enumerate(chunks_of(dy.shape[0], ctx.work.num_chunks)):
                x = _rows_of(ctx, source, rows).requires_grad_(ctx.needs_input_grad[0])
                chunk_seed = None if seed is None else seed + 2 * number
                with torch.enable_grad():
                    y = ctx.work.rerun(x, chunk_seed)
                sums.add(y, x, dy[rows] if ctx.work.num_chunks > 1 else dy.view(y.shape), rows)
                del x, y
        gradients = iter(sums.of_parameters())
        of_parameters = (next(gradients) if needed else None for needed in ctx.needs_input_grad[offset:])
        return sums.dx, None, None, None, *(None for _ in range(ctx.layout.num_kept)), *of_parameters


class _Sums:
    """The gradients of all chunks so far; several chunks of half precision are added up in float32."""

    def __init__(self, ctx: Any, trained: list[Tensor]) -> None:
        self.dx: Tensor | None = None
        self._shape = ctx.shape
        self._several = ctx.work.num_chunks > 1
        self._needs_dx = ctx.needs_input_grad[0]
        self._trained = trained
        self._sums: list[Tensor | None] = [None] * len(trained)

    def add(self, y: Tensor, x: Tensor, dy: Tensor, rows: slice) -> None:
        """Differentiate one chunk's y with the upstream gradient dy (C, O)."""
        inputs = ([x] if self._needs_dx else []) + self._trained
        found = list(torch.autograd.grad(y, inputs, dy, allow_unused=True))
        if self._needs_dx:
            self._put(found.pop(0), rows)
        for i, gradient in enumerate(found):
            self._sums[i] = self._added(self._sums[i], gradient)

    def _put(self, dx: Tensor | None, rows: slice) -> None:
        if dx is None or not self._several:
            self.dx = None if dx is None else dx.view(self._shape)
            return
        if self.dx is None:
            self.dx = dx.new_empty(self._shape)
        self.dx.view(-1, self._shape[-1])[rows] = dx

    def _added(self, total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or total is not None:
            return total if gradient is None else total.add_(gradient)  # type: ignore[union-attr]
        return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) if self._several else gradient

    def of_parameters(self) -> list[Tensor | None]:
        return [None if s is None else s.to(p.dtype) for s, p in zip(self._sums, self._trained, strict=True)]


def _rows_of(ctx: Any, source: Sequence[Tensor], rows: slice) -> Tensor:
    """Rows of x, (C, D), or the whole x (..., D) where there is one chunk; a new tensor object."""
    recipe: Recipe | None = ctx.recipe
    if ctx.work.num_chunks == 1:
        x = recipe.recompute(*source) if recipe is not None else source[0]
    elif recipe is None:
        x = source[0].reshape(-1, ctx.shape[-1])[rows]
    else:
        x = recipe.output_slice(source, rows)
    return x.detach()


def _unchanged(now: Sequence[Tensor], then: Sequence[weakref.ref[Tensor]]) -> Sequence[Tensor]:
    if len(now) != len(then) or any(ref() is not p for p, ref in zip(now, then, strict=True)):
        raise RuntimeError(
            "memsave: a block that is recomputed in backward has other parameters now than in forward (an adapter was "
            "added or switched, or torch.func.functional_call was used); change them after backward, or use "
            'RecomputeMLPConfig(recompute="elementwise").'
        )
    return now


def _random_states(x: Tensor) -> tuple[Tensor, ...]:
    """The states of the generators that forward may draw from: the CPU's and that of x's device."""
    module = None if x.device.type == "cpu" else getattr(torch, x.device.type, None)
    return (torch.get_rng_state(), *(() if module is None else (module.get_rng_state(x.device),)))


@contextmanager
def _replayed(states: Sequence[Tensor], like: Tensor) -> Iterator[None]:
    """Within it, random numbers are drawn from `states` on, if there are any; afterwards as if nothing was drawn."""
    if not states:
        yield
        return
    device = like.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.set_rng_state(states[0])
        for state in states[1:]:
            getattr(torch, device.type).set_rng_state(state, device)
        yield
