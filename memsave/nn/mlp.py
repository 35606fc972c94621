"""Feed-forward blocks, gated and plain, that keep their pre-activations or only their input.

x is (..., D), N rows; gate, up and h are (..., F); y (..., O):

    gated: y = down(act(gate(x)) * up(x));  plain: y = down(act(pre(x)))

"elementwise" keeps gate and up (or pre), and recomputes h in a fused kernel: the note of h serves `down`. "all" keeps
x alone, which costs nothing where a norm made it, and runs the block again in backward. Matrix products always call
the child modules, so adapters in them go on working. Without gradients, and in that backward, the block runs over
chunks of rows, so that its temporary bytes do not grow with N.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from ..ops.activation import reference
from .activation import activate, gated
from .converted import Converted, is_watched, original_class
from .eager import autocast_enabled, only_input, plain
from .linear import ConvertedLinear, is_linear
from .mlp_graph import MLPGraph, out_features
from .recompute import Work, recomputed, run_in_chunks
from .rerun import BackwardDraw, Rerun, rerunning
from .rows import KeepRows

CHUNK_BYTES = {"cpu": 16 * 2**20}
CHUNK_BYTES_ELSEWHERE = 128 * 2**20
"""How many bytes the (C, F) tensors of one chunk may take, by type of device."""
MIN_CHUNK_ROWS = 256
"""C is never below: a matrix product of fewer rows waits for its weight."""


class ConvertedMLP(Converted):
    """A block that `mlp_graph` recognized. Its parts: "mlp", the graph; "recompute"; "backward_rows", a `KeepRows`."""

    @property
    def _graph(self) -> MLPGraph:
        return self._memsave_parts["mlp"]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = only_input(self, args, kwargs)  # type: ignore[arg-type]
        if x is None or plain(x) or x.dim() == 0 or not self._is_as_traced(x):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        seed = self._new_seed(x)
        parameters = self._parameters_now()
        if not (torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))):
            y = run_in_chunks(self._block, x, self._num_chunks(x, backward=False))
        elif self._memsave_parts["recompute"] == "all" and _can_leave(parameters):
            y = recomputed(self._work(x, seed), x, seed)
        else:
            y = self._block(x)
        trailing = self._graph.trailing
        return y if trailing is None else self._child(trailing)(y)

    def _child(self, name: str) -> nn.Module:
        return self.get_submodule(name)  # type: ignore[attr-defined]

    def _block(self, x: Tensor) -> Tensor:
        """From x to what `down` gives, row by row."""
        return self._down(self._product(self._pre(x), noted=True))

    def _rerun(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """The same in backward: the output is not made, and rows are drawn by `seed` unless that is None."""
        draws, down = self._draws(seed), self._child(self._graph.down)
        with rerunning(Rerun(draws, down if isinstance(down, ConvertedLinear) and _works_row_by_row(down) else None)):
            # Without a note h is kept: it is read at once.
            h = self._product(self._pre(x), noted=False)
            first = self._child(self._graph.linears[0])
            if len(self._graph.linears) == 2 and first in draws and h.grad_fn is not None:
                # What the product's backward gives to both linears is known before either of them runs.
                h.grad_fn.register_hook(lambda grads, _: draws[first].expect(*grads[:2]))
            return self._down(h)

    def _pre(self, x: Tensor) -> list[Tensor]:
        """gate and up, or pre alone."""
        pre = [self._child(name)(x) for name in self._graph.linears]
        if self._graph.fused:
            pre = list(pre[0].chunk(2, dim=-1))
        return [pre[self._graph.gate], pre[1 - self._graph.gate]] if self._graph.gated else pre

    def _product(self, pre: list[Tensor], *, noted: bool) -> Tensor:
        """h; it empties the list `pre`, so that without gradients these tensors are freed."""
        if pre[0].device.type == "cpu" and not torch.is_grad_enabled():
            h = self._plain_product(*pre)
        else:
            make: Callable[..., Tensor] = gated if self._graph.gated else activate
            h = make(*pre, self._graph.activation, noted=noted)
        pre.clear()
        return h

    def _down(self, h: Tensor) -> Tensor:
        graph = self._graph
        return self._child(graph.down)(h if graph.dropout is None else self._child(graph.dropout)(h))

    def _plain_product(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """h without gradients, with the plain model's bits; the product overwrites what the activation made."""
        act = self._graph.act
        a = reference.activation(gate, self._graph.activation) if act is None else self._child(act[0])(gate)
        return a if up is None else a.mul_(up)

    def _draws(self, seed: Tensor | None) -> dict[nn.Module, BackwardDraw]:
        """The draws of one pass, by linear; those that read x share theirs."""
        keep: KeepRows | None = self._memsave_parts.get("backward_rows")
        if keep is None or seed is None:
            return {}
        of_x, of_h = BackwardDraw(keep, seed), BackwardDraw(keep, seed + 1)
        named = dict.fromkeys(self._graph.linears, of_x) | {self._graph.down: of_h}
        children = ((self._child(name), draw) for name, draw in named.items())
        return {child: draw for child, draw in children if _works_row_by_row(child)}

    def _new_seed(self, x: Tensor) -> Tensor | None:
        """In every training forward, also without gradients: see `ConvertedLinear.forward`."""
        return ops.new_seed(x) if self.training and "backward_rows" in self._memsave_parts else None  # type: ignore[attr-defined]

    def _parameters_now(self) -> list[Tensor]:
        return [p for name in (*self._graph.linears, self._graph.down) for p in self._child(name).parameters()]

    def _work(self, x: Tensor, seed: Tensor | None) -> Work:
        return Work(
            self._block,
            self._rerun,
            self._parameters_now,
            self._num_chunks(x, backward=True),
            replay=not self._works_row_by_row(),
        )

    def _is_as_traced(self, x: Tensor) -> bool:
        """Whether the children are such that the original forward would do no more than the graph says."""
        graph = self._graph
        if any(is_watched(self._child(name)) for name in graph.others):
            return False
        if graph.act is not None and original_class(self._child(graph.act[0])).__qualname__ != graph.act[1]:
            return False
        if autocast_enabled(x):
            return True
        weights = (getattr(self._child(name), "weight", None) for name in (*graph.linears, graph.down))
        return all(weight is None or weight.dtype == x.dtype for weight in weights)

    def _works_row_by_row(self) -> bool:
        dropout = None if self._graph.dropout is None else self._child(self._graph.dropout)
        draws = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        linears = (self._child(name) for name in (*self._graph.linears, self._graph.down))
        return not draws and all(map(_works_row_by_row, linears))

    def _num_chunks(self, x: Tensor, *, backward: bool) -> int:
        """Into how many chunks the rows of x are split; 1 where the block must not be split."""
        if not self._works_row_by_row():
            return 1
        num_rows = prod(x.shape[:-1])
        hidden = max(out_features(self._child(name)) for name in self._graph.linears)
        # gate, up and h; in backward also their gradients.
        row_bytes = hidden * (3 if self._graph.gated and not self._graph.fused else 2) * (2 if backward else 1)
        budget_bytes = CHUNK_BYTES.get(x.device.type, CHUNK_BYTES_ELSEWHERE)
        chunk_rows = max(MIN_CHUNK_ROWS, budget_bytes // (row_bytes * x.dtype.itemsize))
        return max(1, -(-num_rows // chunk_rows))

    def reference(self, x: Tensor) -> Tensor:
        """The original forward; where rows are drawn in backward, with the gradients of one run that draws them."""
        seed, trailing = self._new_seed(x), self._graph.trailing
        if seed is None or not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        with torch.no_grad():
            y = self._block(x)
        zero = self._rerun(x, seed)
        y = y + zero - zero.detach()
        return y if trailing is None else self._child(trailing)(y)

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype, *, noted: bool = False) -> int:
        """Bytes that one training forward keeps, parameters and what dropout children keep not counted.

        N * D elements of x, none with a note. "elementwise": N * F elements of gate and of up, or of pre. "all": a
        seed of 8 bytes where rows are drawn, and the random state where a child draws numbers.
        """
        num_rows = prod(input_shape[:-1])
        kept = 0 if noted else prod(input_shape) * dtype.itemsize
        if self._memsave_parts["recompute"] == "all":
            seed_bytes = 8 if self.training and "backward_rows" in self._memsave_parts else 0  # type: ignore[attr-defined]
            return kept + seed_bytes + (0 if self._works_row_by_row() else torch.get_rng_state().nbytes)
        widths = (out_features(self._child(name)) for name in self._graph.linears)
        return kept + num_rows * sum(widths) * dtype.itemsize


def _works_row_by_row(linear: nn.Module) -> bool:
    """Whether `linear` may be given some rows at a time: there is no adapter, hook or sample that sees all of them."""
    parts = linear.__dict__.get("_memsave_parts", {})
    return is_linear(linear) and not is_watched(linear) and "keep" not in parts


def _can_leave(parameters: list[Tensor]) -> bool:
    """Whether the gradients of all parameters can leave through a Function that names these parameters.

    Not those of a DTensor, in whose place the child's own hooks put another tensor, nor those of one with hooks, which
    would see the gradient twice.
    """
    return all(type(p) in (nn.Parameter, Tensor, FakeTensor) and not p._backward_hooks for p in parameters)
