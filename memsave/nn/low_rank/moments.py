"""Second moments of what linears read: C (D, D), the sum of x x^T over all inputs x of some batches.

For whitening (see `factorize.py`; SVD-LLM, arXiv 2403.07378). The moments of a whole model need not fit: they are made
some at a time, with a pass over all batches each time, handed out one by one, and freed. Modules that read one tensor,
such as the projections to queries, keys and values, share a moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from operator import length_hint
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..calibrating import (
    accumulator_dtype,
    check_batches,
    check_passes,
    cut,
    evaluating,
    progress,
    run,
    same_count,
    same_random_numbers,
)
from ..matrix import as_matrix

_ENTRIES_AT_ONCE = 2**20  # of a half-precision input, turned to float32
_DELAY = 2.0  # seconds until a progress bar appears

Use = Callable[[tuple[str, ...], Tensor], object]


def second_moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    use: Use,
    *,
    budget_bytes: int | None = None,
) -> None:
    """Call `use(names, moment)` once for each input: with the modules that read it, and its second moment.

    The model runs in eval mode, without gradients, under the caller's autocast, and every pass starts with the caller's
    random numbers. Whenever `use` is called, and at the end or after an error, the model's modes and hooks and torch's
    random numbers are as before. `use` may replace the modules that it is given: those of later passes then read what
    the changed model computes. A moment is freed when `use` returns, unless `use` keeps it.

    Args:
        model: on the device of the batches; not wrapped by DDP or FSDP.
        modules: parts of `model` by any names, such as `nn.Linear` and `Conv1D`; each has one input (..., D).
        batches: run through several times if needed, such as a list or a DataLoader. A mapping is passed to the model
            as keyword arguments, a tuple or list as arguments, anything else as the only argument. The first one is run
            once more than the others: it shows which modules read the very same tensors.
        use: gets names in the order of `modules`, and C (D, D) on the device of the input, in float32, or float64 for
            float64 inputs. It is symmetric up to rounding.
        budget_bytes: how many bytes of moments may live at once; one always does. None means those of the largest.
            More bytes mean fewer passes.

    Raises:
        ValueError: `batches` is no iterable of batches, is empty, or is a one-shot iterator where several passes are
            needed; a module is not part of `model`, reads something else than one floating-point tensor, or is reached
            by no batch; modules read one tensor in the first batch, but not in another. All of these are found before
            the first call of `use`. Not so for an input that is not finite, and passes of unequal length.
    """
    own = {id(module) for module in model.modules()}
    foreign = [name for name, module in modules.items() if id(module) not in own]
    if foreign:
        raise ValueError(f"modules: {', '.join(foreign)}: not a part of the model; expected some of its modules")
    check_batches(batches)
    if not modules:
        return
    total = length_hint(batches, -1)
    with _calm(model):
        iterator = iter(batches)
        first = list(islice(iterator, 1))
        same_count(None, len(first))
        with same_random_numbers(model):
            groups = _groups(model, modules, first[0])
        passes = cut({key: group.moment_bytes for key, group in groups.items()}, budget_bytes)
        check_passes(batches, len(passes), "all moments")
        keys = passes[0]
        with progress(chain(first, iterator), _title(1, passes), "batch", total=total, delay_seconds=_DELAY) as several:
            moments, num_batches = _moments(model, modules, groups, keys, several, watch=True)
    del first, iterator, several
    for number, later in enumerate([*passes[1:], []], 2):
        for key in keys:
            use(groups[key].names, moments.pop(key))
        if not later:
            return
        keys = later
        with _calm(model), progress(batches, _title(number, passes), "batch", delay_seconds=_DELAY) as several:
            moments, seen = _moments(model, modules, groups, keys, several, watch=False)
        same_count(num_batches, seen)


class _Group(NamedTuple):
    """Modules that read the same tensors; the first of them stands for all."""

    names: tuple[str, ...]
    moment_bytes: int


class _Reads:
    """Which tensors modules read during one batch, as numbers: one tensor, unchanged, has one number."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {}
        self._alive: list[tuple[weakref.ref[Tensor], int, int]] = []  # tensor, version, number
        self._next = 0

    def add(self, name: str, x: Tensor) -> None:
        self._alive = [entry for entry in self._alive if entry[0]() is not None]
        version = -1 if x.is_inference() else x._version  # -1: nothing tells whether it is changed
        same = (number for known, its, number in self._alive if known() is x and its == version >= 0)
        number = next(same, self._next)
        if number == self._next:
            self._next += 1
            self._alive.append((weakref.ref(x), version, number))
        self.numbers.setdefault(name, []).append(number)


def _groups(model: nn.Module, modules: Mapping[str, nn.Module], batch: Any) -> dict[str, _Group]:
    """The groups by the name of their first module, from a run of one batch."""
    reads = _Reads()
    kinds: dict[str, tuple[int, torch.dtype]] = {}

    def see(name: str, x: Tensor) -> None:
        reads.add(name, x)
        kinds[name] = (x.shape[-1], accumulator_dtype(x))

    with _seeing(modules, see):
        run(model, batch)
    together: dict[Any, list[str]] = {}
    for name in modules:  # those that this batch did not reach stay alone
        numbers = reads.numbers.get(name)
        together.setdefault(name if numbers is None else tuple(numbers), []).append(name)
    groups = {}
    for names in together.values():
        features, dtype = kinds[names[0]] if names[0] in kinds else _expected(modules[names[0]])
        groups[names[0]] = _Group(tuple(names), features**2 * dtype.itemsize)
    return groups


def _expected(module: nn.Module) -> tuple[int, torch.dtype]:
    """Features and the moment's dtype of a linear that has not run yet."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    features = getattr(module, "in_features", None) or getattr(module, "nx", None) or max(weight.shape)
    return features, accumulator_dtype(weight)


def _moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    groups: Mapping[str, _Group],
    keys: Sequence[str],
    batches: Iterable[Any],
    *,
    watch: bool,
) -> tuple[dict[str, Tensor], int]:
    """The moments of the groups `keys`, and how many batches there were; with `watch`, all groups are checked."""
    moments: dict[str, Tensor] = {}
    reads = _Reads()
    reached: set[str] = set()
    seen = 0

    def see(name: str, x: Tensor) -> None:
        if watch:
            reads.add(name, x)
        if x.numel():
            reached.add(name)
        if name in keys:
            if name not in moments:
                moments[name] = x.new_zeros((x.shape[-1], x.shape[-1]), dtype=accumulator_dtype(x))
            _add(moments[name], x)

    with _seeing(modules if watch else {key: modules[key] for key in keys}, see):
        for number, batch in enumerate(batches):
            seen += 1
            reads = _Reads()
            run(model, batch)
            _check_finite(moments, number)
            for group in groups.values() if watch else ():
                _check_shared(group, reads, number)
    missing = [name for name in (modules if watch else keys) if name not in reached]
    if missing:
        raise ValueError(
            f"modules: no batch reaches {', '.join(missing)}; expected batches in which the model calls it, or leave "
            f"it out"
        )
    return moments, seen


def _add(moment: Tensor, x: Tensor) -> None:
    x = as_matrix(x.detach())  # (N, D)
    rows = len(x) if x.dtype == moment.dtype else max(1, _ENTRIES_AT_ONCE // max(1, x.shape[1]))
    for part in x.split(rows) if len(x) else ():
        part = part.to(moment.dtype)
        moment.addmm_(part.t(), part)  # autocast leaves what is in place alone


def _check_finite(moments: Mapping[str, Tensor], number: int) -> None:
    for name, moment in moments.items():  # in the order in which the model calls them
        if not bool(moment.diagonal().isfinite().all()):
            raise ValueError(
                f"batches: in batch {number} (the first is 0) the input of {name} is not finite, or its square is not "
                f"in {moment.dtype}; leave the batch out, or run the model in a dtype in which it does not overflow"
            )


def _check_shared(group: _Group, reads: _Reads, number: int) -> None:
    numbers = [reads.numbers.get(name) for name in group.names]
    if any(other != numbers[0] for other in numbers):
        raise ValueError(
            f"batches: {', '.join(group.names)} read the same tensors in batch 0, but not in batch {number}; give this "
            f"batch first, so that each gets its own moment"
        )


@contextmanager
def _calm(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and the caller's random numbers to start with."""
    with torch.inference_mode(False), torch.no_grad(), evaluating(model), same_random_numbers(model):
        yield


@contextmanager
def _seeing(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see` with the name and the input of each of the modules, before it runs."""

    def hook(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
            got = ", ".join(str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in inputs) or "nothing"
            raise ValueError(f"modules: {name}: expected a module that reads one floating-point tensor, got {got}")
        see(name, inputs[0])

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: hook(name, args, kwargs), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


def _title(number: int, passes: Sequence[object]) -> str:
    return f"second moments, pass {number} of {len(passes)}"
