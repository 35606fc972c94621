"""Notes: how to recompute a tensor, so that whoever needs it in backward need not keep it.

A norm that returns y attaches a note to that very tensor object: the tensors that y was made from, and the function
that made it. A linear that receives y saves the note's tensors instead of y: they are kept anyway, so y is free. In
backward the note recomputes y once for all the linears that read it.

Notes chain: a module that maps a noted tensor to a new one may attach a note that is made of the first one's (see
`source`). So of fc1 -> activation -> dropout -> fc2 only the activation's input and the dropout's mask are kept.

A note is used only where that is certainly the same: y and the note's tensors were not modified since, and the
saved-tensors hook on top (activation checkpointing, `save_on_cpu`) is the one under which the note was made. A view
that has all rows of y in order counts as y; other views, copies and casts are other tensors and have no note. In
every other case a linear keeps its input as usual.

Shapes: y is (..., D); `rows` index the leading dimensions of y flattened to N.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import MethodType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe:
    """How to make one tensor from what its producer keeps; holds no tensor but, for a moment of backward, that one.

    Autograd contexts hold the recipe while the tensors go through `save_for_backward`: so offloading and checkpointing,
    which take the saved tensors over, really free them.

    Args:
        recompute: makes the output from the note's tensors; row by row, so that it may be given some rows only.
        per_row: which of the note's tensors have the output's leading dimensions.
    """

    def __init__(self, recompute: Callable[..., Tensor], per_row: Sequence[bool]) -> None:
        self.recompute = recompute
        self.per_row = tuple(per_row)
        self.readers = 0
        """How many linears will ask for the whole output in a backward pass."""
        self._left = 0
        self._output: Tensor | None = None

    def output(self, tensors: Sequence[Tensor]) -> Tensor:
        """The output, recomputed from the saved `tensors` by a backward pass's first reader, shared with the rest."""
        if self._output is None:
            self._output = self.recompute(*tensors)
            self._left = self.readers
            # Where some readers take no part in this pass, the end of the pass frees what they did not take.
            torch.autograd.Variable._execution_engine.queue_callback(self._forget)
        output = self._output
        self._left -= 1
        if self._left == 0:
            self._forget()
        return output

    def _forget(self) -> None:
        self._output = None

    def output_rows(self, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Some rows of the output, (k, D), recomputed from those rows of the saved `tensors` alone."""
        picked = [
            t.reshape(-1, t.shape[-1]).index_select(0, rows) if per_row else t
            for t, per_row in zip(tensors, self.per_row, strict=True)
        ]
        return self.recompute(*picked)

    def output_slice(self, tensors: Sequence[Tensor], rows: slice) -> Tensor:
        """As `output_rows`, for rows in one piece: the tensors' own rows are views."""
        picked = [
            t.reshape(-1, t.shape[-1])[rows] if per_row else t for t, per_row in zip(tensors, self.per_row, strict=True)
        ]
        return self.recompute(*picked)


class Note:
    """A recipe, and the tensors that it needs, for one tensor object.

    Args:
        output: the tensor that the recipe makes; it is not held.
        tensors: what it is made from: detached activations, and copies of small parameters (never a module's own
            Parameter, which may be changed or freed before backward).
    """

    def __init__(self, output: Tensor, recipe: Recipe, tensors: Sequence[Tensor]) -> None:
        self.recipe = recipe
        self.tensors = tuple(tensors)
        self._hook = HookMark()
        self._state = self._state_with(output)

    def _state_with(self, output: Tensor) -> tuple[object, ...]:
        return tuple((t._version, t.untyped_storage()._cdata) for t in (output, *self.tensors))

    def holds(self, output: Tensor) -> bool:
        """Whether `output` can still be recomputed, here and now."""
        return bool(self.tensors) and self._state == self._state_with(output) and self._hook.is_on_top()

    def release(self) -> None:
        """Forget the tensors; the note does not hold any more."""
        self.tensors = ()


class Releasable(Protocol):
    def release(self) -> None: ...


class Held:
    """The last few notes or samples made under hooks that take saved tensors over: only these may hold tensors there.

    Elsewhere autograd keeps the same tensors anyway. Under a checkpoint nobody does, and what it frees must not be held
    by a note because the output lives on, say as the input of the next checkpoint. Readers follow closely, so few are
    enough.
    """

    def __init__(self, count: int) -> None:
        self._last: deque[weakref.ref[Releasable]] = deque(maxlen=count)

    def add(self, entry: Releasable) -> None:
        """Hold `entry`, and release the oldest one, if a hook takes saved tensors over now."""
        if not is_taken_over():
            return
        if len(self._last) == self._last.maxlen and (oldest := self._last[0]()) is not None:
            oldest.release()
        self._last.append(weakref.ref(entry))


_notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_held = Held(2)  # two, for layers that norm one input twice before they read either


def attach(output: Tensor, recipe: Recipe, tensors: Sequence[Tensor]) -> None:
    """Attach a note to the tensor object `output`, unless nothing will be kept for its sake."""
    if output.grad_fn is None:
        return
    _notes[output] = written = Note(output, recipe, tensors)
    _held.add(written)
    # Whoever holds the output after its backward must not hold what it was made from.
    reference = weakref.ref(output)
    output.grad_fn.register_prehook(lambda _: _forget(reference()))


def _forget(output: Tensor | None) -> None:
    if output is not None:
        _notes.pop(output, None)


def find(x: Tensor) -> Note | None:
    """The note of the tensor object `x`, or of the tensor that it is a mere reshaping of, if it still holds."""
    maker = x if x in _notes else whole(x)
    note = _notes.get(maker)
    return note if note is not None and note.holds(maker) else None


def whole(x: Tensor) -> Tensor:
    """The tensor of which `x` is a view with all its rows in order, else `x`; `fully_shard` hands on such views."""
    return x._base if x._base is not None and _same_rows(x, x._base) else x


class Source(NamedTuple):
    """How to make a tensor x from kept tensors; the start of a recipe for what is made from x.

    Attributes:
        recompute: makes x, or a view that x was a mere reshaping of, from `tensors`; row by row.
        tensors: what is kept for it.
        per_row: which of the tensors have the leading dimensions of x.
    """

    recompute: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    per_row: tuple[bool, ...]


def source(x: Tensor) -> Source:
    """How to make x, for the note of what is made from it: as its own note says if that holds, else x itself is kept.

    What is attached then must not need the tensors to have the shape of x, but only its rows:

        recompute, tensors, per_row = notes.source(x)
        recipe = notes.Recipe(lambda *kept: F.gelu(recompute(*kept)), per_row)
        notes.attach(y, recipe, tensors)
    """
    note = find(x)
    if note is None:
        return Source(_itself, (x.detach(),), (True,))
    return Source(note.recipe.recompute, note.tensors, note.recipe.per_row)


def _itself(x: Tensor) -> Tensor:
    return x


def _same_rows(view: Tensor, base: Tensor) -> bool:
    """Whether the view has just the base's rows in the base's order: `y[:, :]`, `y.view(-1, D)`."""
    return (
        view.numel() == base.numel()
        and view.dim() > 0
        and base.dim() > 0
        and view.shape[-1] == base.shape[-1]
        and view.dtype == base.dtype
        and view.is_neg() == base.is_neg()
        and view.is_contiguous()
        and base.is_contiguous()
    )


class HookMark:
    """Remembers the saved-tensors hooks on top, weakly: a checkpoint's hooks lead to all that it holds."""

    def __init__(self) -> None:
        self._hooks = tuple(_weak(hook) for hook in _top_hooks())

    def is_on_top(self) -> bool:
        """Whether a tensor saved for backward now would pass through the same hooks."""
        top = _top_hooks()
        return len(top) == len(self._hooks) and all(ref() == hook for ref, hook in zip(self._hooks, top, strict=True))


def is_taken_over() -> bool:
    """Whether a tensor saved for backward now goes to a hook that need not keep it (memsave's own counters do)."""
    return any(not getattr(pack, "counts_only", False) for pack in _top_hooks()[:1])


def _top_hooks() -> tuple[Callable[..., object], ...]:
    """The (pack, unpack) hooks on top, or ()."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) or ()


def _weak(hook: Callable[..., object]) -> Callable[[], object]:
    try:
        return weakref.WeakMethod(hook) if isinstance(hook, MethodType) else weakref.ref(hook)
    except TypeError:  # a callable without weak references holds no closure either
        return lambda: hook
