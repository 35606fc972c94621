"""Masks by gradient: the entries of each weight whose gradient over some batches is largest.

W (R, C) a weight, G = sum over the batches of dL/dW. The score is |G|, or |W * G| ("snip").

The dense gradients of a whole model need not fit: weights go group by group, with a pass over all batches for each.
Only the group's weights need gradients then. Each gradient is added to its accumulator as soon as it is complete, and
freed. Every pass sees the same random numbers, so that the grouping does not change the masks.

Source: Bhardwaj et al., "Sparse High Rank Adapters", 2024 (arXiv 2406.13175), section 3.1; SNIP: Lee et al., 2019
(arXiv 1810.02340).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..calibrating import (
    accumulator_dtype,
    check_batches,
    check_passes,
    cut,
    progress,
    run,
    same_count,
    same_random_numbers,
)
from .checks import check_count
from .selection import largest

SCORES = ("gradient", "snip")

Loss = Callable[[Any], Tensor]


def gradient_masks(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    counts: Mapping[str, int],
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    score: str = "gradient",
    budget_bytes: int | None = None,
) -> dict[str, Tensor]:
    """For each weight, the positions of its largest scores; among equal scores the lowest positions win.

    The model runs in the mode that it is in (dropout acts in training mode) and under the caller's autocast. Afterwards
    it is as before, also after an error: `requires_grad`, `.grad`, hooks, the running statistics of its batch and
    instance norms, and torch's random numbers, with which every pass starts anew. A weight's own post-accumulate hooks
    (such as an optimizer's step in backward) do not run.

    Args:
        model: on the device of the batches; not wrapped by DDP or FSDP.
        weights: parameters of `model` by name, each once; floating-point, any shape.
        counts: how many positions for each of these names.
        batches: an iterable that can be run through several times, such as a list or a DataLoader. A mapping is passed
            to the model as keyword arguments, a tuple or list as arguments, anything else as the only argument.
        loss: maps the model's output to a scalar; None takes the output's `.loss`.
        score: "gradient" for |G| or "snip" for |W * G|.
        budget_bytes: how many bytes of accumulators (float32, or float64 for float64 weights) may live at once; one
            weight's always do. None means those of the largest weight. More bytes mean fewer passes.

    Returns:
        For each name (counts[name],) int32, strictly ascending flat positions, on the device of the weight.

    Raises:
        ValueError: an argument is not as described; `batches` is a one-shot iterator, but several passes are needed;
            there are no batches; a weight gets no gradient, or one that is not finite.
    """
    _check(model, weights, counts, score)
    groups = cut({name: w.numel() * accumulator_dtype(w).itemsize for name, w in weights.items()}, budget_bytes)
    check_batches(batches)
    check_passes(batches, len(groups), "all gradients")
    masks: dict[str, Tensor] = {}
    num_batches: int | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_restored(model))
        for group in stack.enter_context(progress(groups, "calibrating masks", "pass")):
            sums, num_batches = _gradient_sums(
                model, {name: weights[name] for name in group}, batches, loss, num_batches
            )
            for name in group:
                masks[name] = _mask(name, weights[name], sums.pop(name), counts[name], score)
    return {name: masks[name] for name in weights}


def _check(model: nn.Module, weights: Mapping[str, nn.Parameter], counts: Mapping[str, int], score: str) -> None:
    if score not in SCORES:
        raise ValueError(f"score: expected one of {SCORES}, got {score!r}")
    if weights.keys() != counts.keys():
        raise ValueError(f"counts: names differ from those of weights: {sorted(weights.keys() ^ counts.keys())}")
    own = {id(parameter) for parameter in model.parameters()}
    names: dict[int, str] = {}
    for name, weight in weights.items():
        if id(weight) not in own:
            raise ValueError(f"weights: {name} is not a parameter of the model")
        if id(weight) in names:
            raise ValueError(f"weights: {names[id(weight)]} and {name} are the same parameter; name it once")
        if not weight.is_floating_point():
            raise ValueError(f"weights: {name} has dtype {weight.dtype}, which has no gradient")
        names[id(weight)] = name
        try:
            check_count(counts[name], weight.numel())
        except ValueError as error:
            raise ValueError(f"counts: {name}: {error}") from None


def _gradient_sums(
    model: nn.Module, group: Mapping[str, nn.Parameter], batches: Iterable[Any], loss: Loss | None, before: int | None
) -> tuple[dict[str, Tensor], int]:
    """The sums of gradients over one pass, by name, and the number of batches: that of the pass `before`."""
    sums: dict[str, Tensor] = {}
    seen = 0
    with same_random_numbers(model), _hooked(group, sums):
        for batch in batches:
            seen += 1
            value = _loss_of(model, batch, loss)
            if value.requires_grad:  # else no weight of the group took part
                value.backward()
            del value
    same_count(before, seen)
    missing = [name for name in group if name not in sums]
    if missing:
        raise ValueError(f"no batch gives a gradient to {', '.join(missing)}: the loss does not depend on it")
    return sums, seen


def _loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    output = run(model, batch)
    value = getattr(output, "loss", None) if loss is None else loss(output)
    if value is None:
        raise ValueError(
            f"the model's output ({type(output).__name__}) has no .loss: give batches with labels, or loss=, a "
            f"function of the output"
        )
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a scalar tensor, got {got}")
    return value


def _mask(name: str, weight: nn.Parameter, total: Tensor, count: int, score: str) -> Tensor:
    """The mask of one weight; overwrites `total`, the sum of its gradients."""
    with torch.no_grad():
        if score == "snip":
            total.mul_(weight)
        total.abs_()
        if total.numel() and not bool(total.max().isfinite()):  # max keeps a NaN
            raise ValueError(f"the gradient of {name}, summed over the batches, is not finite")
        return largest(total, count)


@contextmanager
def _hooked(group: Mapping[str, nn.Parameter], sums: dict[str, Tensor]) -> Iterator[None]:
    """Let the gradients of the group's weights, and of no other parameter, go into `sums`."""

    def add(name: str, weight: Tensor) -> None:
        gradient = weight.grad
        weight.grad = None
        if gradient is None:
            return
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        if name in sums:
            sums[name].add_(gradient)
        else:  # AccumulateGrad leaves a gradient that nothing else holds
            sums[name] = gradient.detach().to(accumulator_dtype(weight))

    with ExitStack() as stack:
        for name, weight in group.items():
            stack.callback(weight.requires_grad_, weight.requires_grad)
            stack.callback(setattr, weight, "grad", weight.grad)
            weight.grad = None
            weight.requires_grad_(True)
            stack.enter_context(_without_own_hooks(weight))
            handle = weight.register_post_accumulate_grad_hook(lambda p, name=name: add(name, p))
            stack.callback(handle.remove)
        yield


@contextmanager
def _without_own_hooks(weight: nn.Parameter) -> Iterator[None]:
    """Set aside the weight's own post-accumulate hooks: they may step an optimizer, or take the gradient away."""
    own = weight._post_accumulate_grad_hooks
    weight._post_accumulate_grad_hooks = OrderedDict()
    try:
        yield
    finally:
        # torch keeps the last dict if it is given None.
        weight._post_accumulate_grad_hooks = OrderedDict() if own is None else own


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Turn all gradients off; put `requires_grad` and the norms' running statistics back at the end."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.training]
    buffers = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
