"""Calibration: how units of feed-forward blocks are active on batches of data, and routers that predict it.

D features, F units, G blocks, P sampled tokens. A unit's share of a token is its part of sum_u h_u^2 |v_u|^2, v_u its
column of down. A first pass over the batches samples shares for the clustering; a second one adds up the normal
equations from x to the shares of the blocks, so that the router's scores are the best linear prediction of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.activation import reference as activation_reference
from ..calibrating import (
    accumulator_dtype,
    check_batches,
    cut,
    evaluating,
    progress,
    run,
    same_count,
    same_random_numbers,
)
from ..eager import no_autocast
from ..matrix import as_matrix
from ..mlp_graph import mlp_graph
from .clustering import clustered
from .layout import LinearPart, UnitRows, down_weight, unit_rows
from .replacing import Fitted, layout_of, roles

SAMPLED_TOKENS = 1024
"""P is at least this where there are so many tokens, and below twice as many."""
RIDGE = 1e-2
"""Of the mean square of the features' deviations, added to each."""
SCORE_SCALE = 0.02
"""The root mean square of a fitted router's scores, their mean over the blocks taken off. Small, so that c is near 1:
the best blocks then give what they gave in the dense block, and which are best does not depend on it."""
_ENTRIES_AT_ONCE = 2**22


def fit_routing(
    model: nn.Module, targets: Mapping[str, nn.Module], batches: Iterable[Any], blocks: int, budget_bytes: int | None
) -> dict[str, Fitted]:
    """The order of the units and the router of each target, by name.

    The model runs in eval mode, without gradients; every pass starts with the caller's random numbers. Afterwards its
    modes and hooks and torch's random numbers are as before.

    Args:
        targets: feed-forward blocks of `model`, by any names.
        batches: run through at least twice, such as a list. A mapping is passed to the model as keyword arguments, a
            tuple or list as arguments, anything else as the only argument.
        budget_bytes: how many bytes of statistics may live at once, those of one block at least (None). More bytes
            mean fewer passes.

    Raises:
        ValueError: `batches` is no iterable of batches, is empty or a one-shot iterator; no batch reaches a target, or
            its input is not finite.
    """
    check_batches(batches)
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: a one-shot iterator ({type(batches).__name__}), but clustering and fitting need a pass each; "
            "give a list or a DataLoader"
        )
    works = {name: _Activity(module, blocks) for name, module in targets.items()}
    orders: dict[str, Tensor] = {}
    count = None
    for names in cut({name: work.sample_bytes for name, work in works.items()}, budget_bytes):
        samples = {name: _Sample() for name in names}
        count = same_count(count, _pass(model, targets, batches, {n: _sampling(works[n], samples[n]) for n in names}))
        for name in names:
            _check_reached(name, samples[name].seen)
            orders[name] = clustered(samples.pop(name).rows(), blocks)
    found: dict[str, Fitted] = {}
    for names in cut({name: work.sums_bytes for name, work in works.items()}, budget_bytes):
        sums = {name: _Sums(works[name], orders[name], blocks) for name in names}
        count = same_count(count, _pass(model, targets, batches, {name: sums[name].add for name in names}))
        for name in names:
            found[name] = Fitted(orders[name], *sums.pop(name).router(name))
    return found


class _Activity:
    """How active the units of one plain block are."""

    def __init__(self, module: nn.Module, blocks: int) -> None:
        self.layout = layout_of(module, blocks, blocks)
        linears = [module.get_submodule(name)._parameters for name in roles(mlp_graph(module)).values()]
        values = [[None if p is None else p.detach() for p in (own["weight"], own["bias"])] for own in linears]
        parts = [LinearPart(weight, bias, None, None) for weight, bias in values]
        down = down_weight(self.layout, parts[-1])
        assert down is not None
        self.squares = down.to(accumulator_dtype(down)).square().sum(0)  # (F,)
        self.num_units = len(self.squares)
        self.rows: Sequence[UnitRows] = unit_rows(self.layout, parts, self.num_units)
        features = self.rows[0].weight.shape[1]  # type: ignore[union-attr]
        self.sample_bytes = 2 * SAMPLED_TOKENS * self.num_units * torch.float16.itemsize
        self.sums_bytes = features * (features + blocks) * self.squares.dtype.itemsize

    def shares(self, x: Tensor) -> Tensor:
        """(n, F) of x (n, D): of at least 0, and 1 together, or 0 where no unit is active."""
        with no_autocast(x):
            pre = [
                F.linear(x.to(rows.weight.dtype), rows.weight, rows.bias)
                for rows in self.rows
                if rows.weight is not None
            ]
            h = activation_reference.activation(pre[0], self.layout.activation).to(self.squares.dtype)
            if self.layout.gated:
                h = h * pre[1]
            energy = h.square_().mul_(self.squares)
            return energy.div_(energy.sum(1, keepdim=True).clamp_min_(torch.finfo(energy.dtype).tiny))

    def pieces(self, x: Tensor) -> Iterator[Tensor]:
        """x (N, D) some rows at a time."""
        return iter(x.split(max(1, _ENTRIES_AT_ONCE // self.num_units))) if len(x) else iter(())


class _Sample:
    """Evenly spaced tokens of all that were seen: the more there are, the wider apart."""

    def __init__(self) -> None:
        self.seen = 0
        self._spacing = 1
        self._parts: list[Tensor] = []

    def wanted(self, num_tokens: int) -> slice:
        """Which of the next tokens belong to the sample."""
        first = -self.seen % self._spacing
        self.seen += num_tokens
        return slice(first, num_tokens, self._spacing)

    def add(self, rows: Tensor) -> None:
        self._parts.append(rows)
        while sum(map(len, self._parts)) >= 2 * SAMPLED_TOKENS:
            self._parts = [self.rows()[::2].clone()]
            self._spacing *= 2

    def rows(self) -> Tensor:
        return torch.cat(self._parts)


def _sampling(work: _Activity, sample: _Sample) -> Callable[[Tensor], None]:
    def see(x: Tensor) -> None:
        for part in work.pieces(x[sample.wanted(len(x))]):
            sample.add(work.shares(part).sqrt_().to(torch.float16))  # an amplitude, which float16 holds better

    return see


class _Sums:
    """The normal equations of one router, of inputs whose first mean is taken off: float32 would lose the rest."""

    def __init__(self, work: _Activity, order: Tensor, blocks: int) -> None:
        self._work, self._order, self._blocks = work, order, blocks
        self._count = 0
        self._origin: Tensor | None = None

    def add(self, x: Tensor) -> None:
        if not len(x):
            return
        wide = accumulator_dtype(x)
        if self._origin is None:
            self._origin = x.to(wide).mean(0)  # (D,)
            self._moment, self._sum = x.new_zeros((x.shape[1],) * 2, dtype=wide), torch.zeros_like(self._origin)
            self._cross = x.new_zeros((x.shape[1], self._blocks), dtype=wide)
            self._shares = x.new_zeros(self._blocks, dtype=wide)
        for part in self._work.pieces(x):
            shares = self._work.shares(part)[:, self._order].unflatten(1, (self._blocks, -1)).sum(2).to(wide)  # (n, G)
            part = part.to(wide) - self._origin
            self._moment.addmm_(part.t(), part)
            self._cross.addmm_(part.t(), shares)
            self._sum += part.sum(0)
            self._shares += shares.sum(0)
        self._count += len(x)

    def router(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight (G, D) and bias (G,)."""
        _check_reached(name, self._count)
        assert self._origin is not None
        mean, shares = self._sum.double() / self._count, self._shares.double() / self._count
        moment = self._moment.double() / self._count - mean.outer(mean)
        if not bool(moment.isfinite().all()):
            raise ValueError(f"batches: the input of {name} is not finite; leave out the batch in which it is not")
        cross = self._cross.double() / self._count - mean.outer(shares)
        damping = RIDGE * moment.diagonal().mean() + torch.finfo(torch.float32).tiny
        weight = torch.linalg.solve(moment + damping * torch.eye(len(moment)).to(moment), cross).t()  # (G, D)
        weight, offset = weight - weight.mean(0), shares - shares.mean()
        spread = ((weight @ moment * weight).sum() + offset.square().sum()).div(self._blocks).sqrt()
        scale = SCORE_SCALE / spread.clamp_min(torch.finfo(torch.float32).tiny)
        bias = offset - weight @ (mean + self._origin)
        return (scale * weight).to(self._sum.dtype), (scale * bias).to(self._sum.dtype)


def _check_reached(name: str, num_tokens: int) -> None:
    if not num_tokens:
        raise ValueError(
            f"batches: no batch reaches {name}; expected batches in which the model calls it, or leave it out"
        )


def _pass(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    batches: Iterable[Any],
    see: Mapping[str, Callable[[Tensor], None]],
) -> int:
    """Run all batches, and call `see` of each block with its inputs (N, D); how many batches there were."""
    count = 0
    with ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad(), evaluating(model), same_random_numbers(model)):
            stack.enter_context(context)
        for name, use in see.items():
            stack.enter_context(_seeing(name, targets[name], use))
        for batch in stack.enter_context(progress(batches, "routed blocks", "batch", delay_seconds=2.0)):
            run(model, batch)
            count += 1
    return count


@contextmanager
def _seeing(name: str, module: nn.Module, use: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            got = ", ".join(type(x).__name__ for x in inputs) or "nothing"
            raise ValueError(f"batches: {name} is called with {got}; expected one floating-point tensor")
        use(as_matrix(inputs[0].detach()))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
