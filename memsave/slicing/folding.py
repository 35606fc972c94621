"""Batch norms of a pass as numbers per channel, made once in each call from the live parameters.

Behind a convolution that nothing else reads, they go into its weights, where those are small; elsewhere they are one
multiplication and addition in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .passes import Pass
from .regions import Interval, Region
from .rules.convolution import Convolution
from .rules.local import Compute, Local, accumulation_dtype
from .rules.pointwise import BatchNorm

MOST_FOLDED_BYTES = 2**20


class Prepared(NamedTuple):
    """Stands for a tensor that is made before the passes run: `kind` of the op `node`."""

    kind: str
    node: fx.Node


class ScaleAndShift(Local):
    """A batch norm as x * scale + shift, both (C, 1, ...)."""

    takes_out = True
    in_place = True

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__(norm.node, norm.sources, norm.source_dims, norm.dims)
        self.others = (Prepared("scale", norm.node), Prepared("shift", norm.node))  # type: ignore[assignment]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return start, stop

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        return lambda x, scale, shift, out=None: torch.addcmul(shift, x, scale, out=out)


class FoldedConvolution(Local):
    """A convolution and the batch norm behind it."""

    def __init__(self, convolution: Convolution, norm: BatchNorm) -> None:
        super().__init__(norm.node, convolution.sources, convolution.source_dims, norm.dims)
        self.convolution = convolution
        node = convolution.node
        self.others = (Prepared("weight", node), Prepared("bias", node))  # type: ignore[assignment]

    def need(self, source: int, axis: int, start: int, stop: int) -> Interval:
        return self.convolution.need(source, axis, start, stop)

    def bind(self, out: Region, got: Sequence[Region]) -> Compute:
        return self.convolution.bind(out, got)

    def extra_bytes(self, out: Region, got: Sequence[Region]) -> int:
        return self.convolution.extra_bytes(out, got)

    def macs(self, out: Region, got: Sequence[Region]) -> int:
        return self.convolution.macs(out, got)

    def reach(self, axis: int) -> tuple[int, int] | None:
        return self.convolution.reach(axis)


class LaidOutConvolution(FoldedConvolution):
    """A convolution whose weight is read in another memory format."""

    def __init__(self, convolution: Convolution) -> None:
        super(FoldedConvolution, self).__init__(
            convolution.node, convolution.sources, convolution.source_dims, convolution.dims
        )
        self.convolution = convolution
        made: Any = Prepared("weight", convolution.node)
        self.others = (made, *convolution.others[1:])


class Fold(NamedTuple):
    """A batch norm, and the convolution that takes it in, if one does."""

    norm: BatchNorm
    convolution: Convolution | None


def fold_norms(run: Pass, written: set[fx.Node], formatted: bool) -> tuple[Pass, list[Fold], list[Convolution]]:
    """The pass with its batch norms folded; what must be prepared; and convolutions whose weights are laid out anew.

    Args:
        written: values that other passes write or read whole.
        formatted: whether weights are laid out in channels_last.
    """
    consumers = run.consumers()
    by_node = {rule.node: rule for rule in run.local}
    folds: list[Fold] = []
    formed: list[Convolution] = []
    local: list[Local] = []
    swallowed: set[Local] = set()
    targets = set(run.targets) | written | {r.source for r in run.reductions}
    for rule in run.local:
        if isinstance(rule, BatchNorm):
            before = by_node.get(rule.sources[0])
            alone = isinstance(before, Convolution) and len(consumers[before.node]) == 1 and before.node not in targets
            if alone and is_folded(before):  # type: ignore[arg-type]
                folds.append(Fold(rule, before))  # type: ignore[arg-type]
                swallowed.add(before)  # type: ignore[arg-type]
            else:
                folds.append(Fold(rule, None))
    taken = {fold.norm: fold.convolution for fold in folds}
    for rule in run.local:
        if rule in swallowed:
            continue
        if isinstance(rule, BatchNorm):
            convolution = taken[rule]
            local.append(ScaleAndShift(rule) if convolution is None else FoldedConvolution(convolution, rule))
        elif isinstance(rule, Convolution) and formatted and _changes(rule):
            formed.append(rule)
            local.append(LaidOutConvolution(rule))
        else:
            local.append(rule)
    return Pass(local, run.reductions, run.targets, run.ready), folds, formed


def is_folded(convolution: Convolution) -> bool:
    """Whether a second copy of the weight is small beside what it saves."""
    weight, out = convolution.others[0].meta["val"], convolution.node.meta["val"]
    return bool(weight.nbytes <= MOST_FOLDED_BYTES and 4 * weight.nbytes <= out.nbytes)


def folded_bytes(run: Pass) -> int:
    """About what the weights take that `fold_norms` has made anew."""
    norms = {rule.sources[0] for rule in run.local if isinstance(rule, BatchNorm)}
    convolutions = [rule for rule in run.local if isinstance(rule, Convolution)]
    return sum(r.others[0].meta["val"].nbytes for r in convolutions if r.node in norms and is_folded(r))


def _changes(rule: Convolution) -> bool:
    """Whether the weight is another in channels_last, and small enough for a second copy."""
    weight = rule.others[0].meta["val"]
    return weight.dim() == 4 and not weight.is_contiguous(memory_format=torch.channels_last) and is_folded(rule)


Preparation = tuple[Callable[[list[Any]], Any], int, Sequence[Any]]  # what runs, the slot it fills, what it reads


def preparing(
    folds: Sequence[Fold], formed: Sequence[Convolution], slot: Callable[[Any], int], formatted: bool
) -> list[Preparation]:
    """What makes the tensors that the folded rules read; `slot` numbers whole values and what is prepared."""
    steps: list[Preparation] = []
    if folds:
        read = [n for norm, _ in folds for n in norm.others]
        steps.append((*_scales_and_shifts(folds, slot), read))
    for fold in folds:
        if fold.convolution is not None:
            steps.append((*_folded(fold, slot, formatted), fold.convolution.others))
    for convolution in formed:
        weight = slot(convolution.others[0])
        steps.append((_formatting(weight), slot(Prepared("weight", convolution.node)), convolution.others[:1]))
    return steps


def _formatting(weight: int) -> Callable[[list[Any]], Any]:
    return lambda env: env[weight].contiguous(memory_format=torch.channels_last)


def _scales_and_shifts(folds: Sequence[Fold], slot: Callable[[Any], int]) -> tuple[Callable[[list[Any]], Any], int]:
    """All norms together: a few calls for all of them instead of a few for each."""
    places = []
    for norm, _ in folds:
        _, weight, bias, mean, var = norm.node.args[:5]
        places.append([slot(n) if isinstance(n, fx.Node) else -1 for n in (weight, bias, mean, var)])
    eps = [float(norm.node.args[7]) for norm, _ in folds]  # type: ignore[arg-type]
    scales = [slot(Prepared("scale", norm.node)) for norm, _ in folds]
    shifts = [slot(Prepared("shift", norm.node)) for norm, _ in folds]
    ranks = [len(norm.shape) - 2 for norm, _ in folds]
    dtypes = [norm.node.meta["val"].dtype for norm, _ in folds]
    wides = [accumulation_dtype(dtype) for dtype in dtypes]
    # What goes into a weight is rounded once, with the weight.
    kept = [dtype if fold.convolution is None else wide for fold, dtype, wide in zip(folds, dtypes, wides, strict=True)]

    def run(env: list[Any]) -> None:
        made = torch._foreach_add([env[p[3]].to(wide) for p, wide in zip(places, wides, strict=True)], eps)
        torch._foreach_rsqrt_(made)
        weighted = [i for i, p in enumerate(places) if p[0] >= 0]
        if weighted:
            torch._foreach_mul_([made[i] for i in weighted], [env[places[i][0]] for i in weighted])
        moved = torch._foreach_mul([env[p[2]] for p in places], made)
        torch._foreach_neg_(moved)
        biased = [i for i, p in enumerate(places) if p[1] >= 0]
        if biased:
            torch._foreach_add_([moved[i] for i in biased], [env[places[i][1]] for i in biased])
        for i, (scale, shift) in enumerate(zip(made, moved, strict=True)):
            form = (-1, *[1] * ranks[i])
            env[scales[i]], env[shifts[i]] = scale.to(kept[i]).view(form), shift.to(kept[i]).view(form)

    return run, 0


def _folded(fold: Fold, slot: Callable[[Any], int], formatted: bool) -> tuple[Callable[[list[Any]], Any], int]:
    norm, convolution = fold
    assert convolution is not None
    weight = slot(convolution.others[0])
    bias = slot(convolution.others[1]) if len(convolution.others) > 1 else -1
    scale, shift = slot(Prepared("scale", norm.node)), slot(Prepared("shift", norm.node))
    folded_bias = slot(Prepared("bias", convolution.node))
    form = torch.channels_last if formatted and len(convolution.weight_shape) == 4 else torch.contiguous_format

    def run(env: list[Any]) -> Tensor:
        by, plus, dtype = env[scale].unsqueeze(1), env[shift].flatten(), env[weight].dtype
        env[folded_bias] = (plus if bias < 0 else torch.addcmul(plus, env[bias], env[scale].flatten())).to(dtype)
        env[scale] = env[shift] = None
        return (env[weight] * by).to(dtype).contiguous(memory_format=form)

    return run, slot(Prepared("weight", convolution.node))
