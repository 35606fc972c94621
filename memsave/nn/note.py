"""Notes: how to recompute a tensor, so that whoever needs it in backward need not keep it.

A norm that returns y attaches a note to that very tensor object: the tensors that y was made from, and the function
that made it. A linear that receives y saves the note's tensors instead of y: they are kept anyway, so y is free. In
backward the note recomputes y once for all the linears that read it.

A note is used only where that is certainly the same: y and the note's tensors were not modified since, and the
saved-tensors hook on top (activation checkpointing, `save_on_cpu`) is the one under which the note was made. A view
that has all rows of y in order counts as y; other views, copies and casts are other tensors and have no note. In
every other case a linear keeps its input as usual.

Shapes: y is (..., D); `rows` index the leading dimensions of y flattened to N.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

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
        self._hook = top_hook()
        self._versions = self._versions_with(output)

    def _versions_with(self, output: Tensor) -> tuple[int, ...]:
        return (output._version, *(t._version for t in self.tensors))

    def holds(self, output: Tensor) -> bool:
        """Whether `output` can still be recomputed, here and now."""
        return self._versions == self._versions_with(output) and same_hook(self._hook, top_hook())


_notes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def attach(output: Tensor, recipe: Recipe, tensors: Sequence[Tensor]) -> None:
    """Attach a note to the tensor object `output`, unless nothing will be kept for its sake."""
    if output.grad_fn is None:
        return
    _notes[output] = Note(output, recipe, tensors)
    # Whoever holds the output after its backward must not hold what it was made from.
    reference = weakref.ref(output)
    output.grad_fn.register_prehook(lambda _: _forget(reference()))


def _forget(output: Tensor | None) -> None:
    if output is not None:
        _notes.pop(output, None)


def find(x: Tensor) -> Note | None:
    """The note of the tensor object `x`, or of the tensor that it is a mere reshaping of, if it still holds."""
    base = x._base if x not in _notes else None
    maker = base if base is not None and _same_rows(x, base) else x
    note = _notes.get(maker)
    return note if note is not None and note.holds(maker) else None


def _same_rows(view: Tensor, base: Tensor) -> bool:
    """Whether the view has just the base's rows in the base's order: `y[:, :]`, `y.view(-1, D)`."""
    return (
        view.numel() == base.numel()
        and view.dim() > 0
        and base.dim() > 0
        and view.shape[-1] == base.shape[-1]
        and view.dtype == base.dtype
        and view.is_contiguous()
        and base.is_contiguous()
    )


Hook = tuple[Callable[..., object], Callable[..., object]]


def top_hook() -> Hook | None:
    """The (pack, unpack) hooks that a tensor saved for backward now would pass through."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def same_hook(a: Hook | None, b: Hook | None) -> bool:
    """Whether two results of `top_hook` are the same hooks."""
    if a is None or b is None:
        return a is b
    return a[0] is b[0] and a[1] is b[1]
