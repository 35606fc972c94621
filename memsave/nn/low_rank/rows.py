"""Modules that work on each token alone, run on some tokens at a time; only without gradients.

x is (..., D), N rows (tokens), C of them at a time; hidden units (C, F) never exist for more tokens than that.

Where a block is one module (Llama's MLP), it is given some rows at a time and writes into its output. Where it is
several (BERT's `intermediate` and `output`), the linear of the first one hands on `LazyRows`, and the last one makes
the rows that it needs. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ..calibrating import evaluating
from ..converted import Converted, is_watched, original_class
from ..eager import autocast_enabled, plain
from ..linear import is_linear
from ..matrix import as_matrix
from ..mlp_graph import out_features
from .layout import check_counts
from .lazy_rows import LazyRows, chunk_rows, filled, kept_for_later, piece_bytes, rows_of
from .linear import LowRankLinear


class RowWise(Converted):
    """Mixin of a module whose forward maps each row of its inputs, all (..., width), to one row of its output."""

    @property
    def _work(self) -> RowWork:
        work: RowWork = self.__dict__["_memsave_rows"]
        return work

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not self._serves(args):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        budget_bytes = piece_bytes(self)  # type: ignore[arg-type]
        shape, rows = args[0].shape[:-1], chunk_rows(self._work.hidden_features, args[0], budget_bytes)
        if prod(shape) <= rows and not any(isinstance(x, LazyRows) for x in args):
            return super().forward(*args)  # type: ignore[misc]
        if (
            self._work.kernel is not None
            and len(args) == 1
            and (y := self._by_kernel(args[0], self._work.kernel)) is not None
        ):
            return y
        original, lazy = super().forward, self._work.lazy  # type: ignore[misc]
        sources, checks = zip(*map(kept_for_later, args), strict=True) if lazy else (args, ())

        def make(start: int, stop: int) -> Tensor:
            for check in checks:
                check()
            # With a dimension for the batch: a module may expect one.
            y: Tensor = original(*(_part(x, start, stop) for x in sources))[0]
            return y

        result = torch.Size((*shape, self._work.out_features))
        return LazyRows.of(result, args[0], rows, make) if lazy else filled(result, args[0], rows, make)

    def _by_kernel(self, x: Tensor, block: FusedBlock) -> Tensor | None:
        """The whole block by one op, where all its linears are low-rank with one pair of factors."""
        names = (block.gate, block.up or block.gate, block.down)
        gate, up, down = (self.get_submodule(name) for name in names)  # type: ignore[attr-defined]
        if not all(isinstance(linear, LowRankLinear) and linear.heads is None for linear in (gate, up, down)):
            return None
        if any(module.training for module in _inner_modules(self)):  # type: ignore[arg-type]
            return None  # a dropout that is left on
        latent = as_matrix(gate.project(x))
        (expand, bias), (expand_up, bias_up), latent_up = (gate.second, gate.bias), (None, None), None
        if block.up == block.gate:
            halves = [(w, b) for w, b in zip(gate.second.chunk(2), _halves(gate.bias), strict=True)]
            (expand, bias), (expand_up, bias_up), latent_up = (
                halves[block.gate_half],
                halves[1 - block.gate_half],
                latent,
            )
        elif block.up is not None:
            expand_up, bias_up, latent_up = up.second, up.bias, as_matrix(up.project(x))
        factors = latent, expand, bias, latent_up, expand_up, bias_up, down.first
        y: Tensor = down.expand(ops.low_rank_mlp(*factors, block.activation))
        return y.view(*x.shape[:-1], -1)

    def _serves(self, args: Sequence[Any]) -> bool:
        return (
            not self.training  # type: ignore[attr-defined]
            and not torch.is_grad_enabled()
            and bool(args)
            and all(isinstance(x, Tensor) and x.dim() > 1 and x.shape[:-1] == args[0].shape[:-1] for x in args)
            and len(args) == self._work.num_inputs
            and not plain(args[0])
            and not autocast_enabled(args[0])
            and not any(map(is_watched, _inner_modules(self)))  # type: ignore[arg-type]
        )

    def reference(self, *args: Tensor) -> Tensor:
        return super().forward(*args)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """With gradients it is the original module; nothing is kept without."""
        raise NotImplementedError("a row-wise module streams without gradients only, where nothing is kept")


@dataclass(frozen=True)
class FusedBlock:
    """A feed-forward block by the names of its linears: h = act(gate(x)) [* up(x)], y = down(h).

    Attributes:
        gate, up: the linears; the same one where they are the halves of its output, None for no up.
        gate_half: which half is the gate.
        activation: an `ops.activation.Activation`.
    """

    gate: str
    up: str | None
    down: str
    activation: int
    gate_half: int = 0


@dataclass(frozen=True)
class RowWork:
    """What `RowWise` must know of its module.

    Attributes:
        num_inputs: of the forward.
        out_features: width of the output.
        hidden_features: of the widest tensor inside.
        lazy: whether the module behind it takes `LazyRows`.
        kernel: what `ops.low_rank_mlp` must know to be the whole block, if it shall be.
    """

    num_inputs: int
    out_features: int
    hidden_features: int
    lazy: bool = False
    kernel: FusedBlock | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for `from_dict`."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RowWork:
        """What `to_dict` described."""
        kernel = data.get("kernel")
        check_counts(data, "num_inputs", "out_features", "hidden_features")
        return RowWork(**{**data, "kernel": None if kernel is None else FusedBlock(**kernel)})


@torch.no_grad()
def row_work(module: nn.Module, input_features: Sequence[int]) -> RowWork | None:
    """Try whether `module` works row by row on inputs of these widths; what it is then, or None.

    It is run on a few random rows, once together and once one by one.
    """
    like = next(module.parameters(), None)
    if like is None or like.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 3, width, generator=generator).to(like) for width in input_features]
    forward = original_class(module).forward
    try:
        with evaluating(module):
            y = forward(module, *inputs)
            parts = [forward(module, *(x[:, i : i + 1] for x in inputs)) for i in range(3)]
    except Exception:  # whatever its forward does with a matrix of rows
        return None
    if not isinstance(y, Tensor) or y.dim() != 3 or y.shape[:2] != (1, 3):
        return None
    if not y.isfinite().all():  # nothing can be told from it
        return None
    if not torch.allclose(y, torch.cat(parts, 1), rtol=1e-3, atol=float(1e-3 * y.abs().max())):
        return None
    widths = [out_features(m) for m in module.modules() if is_linear(m) or isinstance(m, LowRankLinear)]
    return RowWork(len(inputs), y.shape[-1], max([*widths, *input_features]))


def _part(x: Tensor, start: int, stop: int) -> Tensor:
    return x.part(start, stop) if isinstance(x, LazyRows) else rows_of(x, start, stop)[None]


def _halves(bias: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if bias is None else bias.chunk(2)


def _inner_modules(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if inner is not module]
