"""Tensors whose rows are made when they are read, some at a time; only without gradients.

A tensor is (..., F), N rows (tokens), C of them at a time.

The first linear of a feed-forward block may return one, and the module that reads it makes the rows that it needs, so
that hidden units never exist for more tokens than that. Activation functions on the way are applied to the rows as they
are made. Whatever does not know it gets the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

CHUNK_BYTES = {"cpu": 4 * 2**20}
CHUNK_BYTES_ELSEWHERE = 64 * 2**20
"""How many bytes the widest tensor (C, F) of one chunk may take, by type of device."""
MIN_CHUNK_ROWS = 64
"""C is never below: a matrix product of fewer rows waits for its weight."""

_aten = torch.ops.aten
_ELEMENTWISE = {
    *(_aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.mish.default),
    *(_aten.tanh.default, _aten.sigmoid.default, _aten.pow.Tensor_Scalar),
    *(_aten.mul.Tensor, _aten.add.Tensor, _aten.mul.Scalar, _aten.add.Scalar),
}
_IN_PLACE = {
    getattr(_aten, name).default: getattr(_aten, f"{name}_").default
    for name in ("relu", "gelu", "silu", "mish", "tanh", "sigmoid")
}


def piece_bytes(module: nn.Module) -> int | None:
    """How many bytes a chunk may take by the config that converted `module`, if that says so."""
    applied = module.__dict__.get("_memsave", {}).values()
    return next((config.piece_bytes for config in applied if hasattr(config, "piece_bytes")), None)


def chunk_rows(features: int, like: Tensor, budget_bytes: int | None = None) -> int:
    """C for a chunk whose widest tensor has so many features, in the dtype and on the device of `like`."""
    if budget_bytes is None:
        budget_bytes = CHUNK_BYTES.get(like.device.type, CHUNK_BYTES_ELSEWHERE)
    return max(MIN_CHUNK_ROWS, budget_bytes // (features * like.dtype.itemsize))


class LazyRows(Tensor):
    """A tensor (..., F) whose rows are made by a function when they are read, some at a time.

    What does not know it gets the whole tensor, which then stays.
    """

    _rows: _Source

    @staticmethod
    def of(
        shape: torch.Size, like: Tensor, rows: int, make: Callable[[int, int], Tensor], *, fresh: bool = False
    ) -> LazyRows:
        """A tensor with the dtype and device of `like`, whose rows `make(start, stop)` makes, so many at a time.

        fresh: whether the rows that `make` returns are a tensor that nobody else has.
        """
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        lazy: LazyRows = Tensor._make_wrapper_subclass(
            LazyRows, shape, strides=strides, dtype=like.dtype, device=like.device
        )
        lazy._rows = _Source(make, rows, fresh)
        return lazy

    def as_it_is(self) -> LazyRows:
        """Another tensor object with these rows, which stay as they are when something writes to this one."""
        twin: LazyRows = Tensor._make_wrapper_subclass(
            LazyRows, self.shape, strides=self.stride(), dtype=self.dtype, device=self.device
        )
        twin._rows = self._rows
        self._rows.readers += 1
        return twin

    @property
    def chunk_rows(self) -> int:
        """How many rows to read at a time."""
        return self._rows.chunk_rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the tensor as a matrix; those that were read last are not made again."""
        return self._rows.rows(start, stop)

    def part(self, start: int, stop: int) -> Tensor:
        """Rows for a module, (1, stop - start, F): still lazy where nobody else reads them, so that they die early."""
        source = self._rows
        if not source.fresh or source.whole is not None:
            return self.rows(start, stop)[None]
        source.in_parts = True

        def make(first: int, last: int) -> Tensor:
            return self.take_rows(start + first, start + last)

        return LazyRows.of(torch.Size((1, stop - start, self.shape[-1])), self, stop - start, make, fresh=True)

    def take_rows(self, start: int, stop: int) -> Tensor:
        """Rows for one reader: not remembered, if nobody else may have them."""
        own = self._rows.own_rows(start, stop)
        return self.rows(start, stop) if own is None else own

    @property
    def made(self) -> Tensor | None:
        """The whole tensor, if something asked for it."""
        return self._rows.whole

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """The names of the tensors that it holds: whoever counts bytes counts these, and no bytes for itself."""
        return ([] if self.made is None else ["made"]), None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _ELEMENTWISE and (later := _elementwise(func, args, kwargs or {})) is not None:
            return later
        writes = getattr(func, "_schema", None) is None or func._schema.is_mutable
        args, kwargs = tree_map_only(LazyRows, _writable if writes else whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyRows(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


class _Source:
    """Where rows come from: the function, the whole once it was made, and the rows that were read last."""

    def __init__(self, make: Callable[[int, int], Tensor], chunk_rows: int, fresh: bool) -> None:
        self.make, self.chunk_rows, self.fresh = make, chunk_rows, fresh
        self.whole: Tensor | None = None
        self.readers, self.in_parts = 0, False  # functions of it, and modules that read it in parts
        self._last: tuple[tuple[int, int], Tensor] | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        if self.whole is not None:
            return self.whole.view(-1, self.whole.shape[-1])[start:stop]
        if self._last is None or self._last[0] != (start, stop):
            self._last = None  # freed before its successor is made
            self._last = (start, stop), self.make(start, stop)
        return self._last[1]

    def own_rows(self, start: int, stop: int) -> Tensor | None:
        """Rows that whoever gets them may overwrite; None where others have them, or will read them."""
        read = self._last is not None and self._last[0] == (start, stop)
        if not self.fresh or self.whole is not None or read or self.readers + self.in_parts > 1:
            return None
        rows, self._last = self.rows(start, stop), None
        return rows


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, with all rows."""
    if not isinstance(tensor, LazyRows):
        return tensor
    source = tensor._rows
    if source.whole is None:
        source.whole = filled(tensor.shape, tensor, source.chunk_rows, source.rows)
        source.make, source._last = _no_rows, None  # what they held is free
    return source.whole


def _writable(tensor: LazyRows) -> Tensor:
    """The whole tensor, for an op that may write to it: those that read its rows later get the old values."""
    old, made = tensor._rows, whole(tensor)
    tensor._rows = _Source(_no_rows, old.chunk_rows, fresh=False)
    tensor._rows.whole = made.clone() if old.readers + old.in_parts else made
    return tensor._rows.whole


def _no_rows(start: int, stop: int) -> Tensor:
    raise AssertionError("the whole is there")


def kept_for_later(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """What a function of rows may read later, and a check to call before: nothing has written to it since.

    The check raises RuntimeError. Under inference mode torch does not tell.
    """
    if isinstance(tensor, LazyRows):
        return tensor.as_it_is(), lambda: None
    version = None if tensor.is_inference() else tensor._version

    def check() -> None:
        if version is not None and tensor._version != version:
            raise RuntimeError(
                "memsave: the input of a layer whose output is made later, some tokens at a time, was modified in "
                "place before that; convert this model with FlashSVDConfig(fuse=False)"
            )

    return tensor, check


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows of any tensor as a matrix (stop - start, F)."""
    if isinstance(tensor, LazyRows):
        return tensor.rows(start, stop)
    return tensor.reshape(-1, tensor.shape[-1])[start:stop]


def filled(shape: torch.Size, like: Tensor, chunk_rows: int, make: Callable[[int, int], Tensor]) -> Tensor:
    """A tensor of `shape` from its rows, made chunk by chunk."""
    num_rows = prod(shape[:-1])
    if 0 < num_rows <= chunk_rows:
        return make(0, num_rows).view(shape)
    y: Tensor | None = None
    for start in range(0, num_rows, chunk_rows):
        part = make(start, min(start + chunk_rows, num_rows))
        if y is None:  # its dtype is the module's business
            y = torch.empty(shape, dtype=part.dtype, device=part.device)
        y.view(-1, shape[-1])[start : start + chunk_rows] = part
        del part
    return torch.empty(shape, dtype=like.dtype, device=like.device) if y is None else y


def _elementwise(func: Any, args: Any, kwargs: Any) -> LazyRows | None:
    """The function of rows to come; None where it takes other tensors than such of one shape."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    first = tensors[0]
    if not all(isinstance(t, LazyRows) and t.shape == first.shape and t.dtype == first.dtype for t in tensors):
        return None
    args, kwargs = tree_map_only(LazyRows, LazyRows.as_it_is, (args, kwargs))
    first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyRows))

    def make(start: int, stop: int) -> Tensor:
        if tensors[1:] or func not in _IN_PLACE or (own := first._rows.own_rows(start, stop)) is None:
            return _applied(func, args, kwargs, start, stop)
        return _IN_PLACE[func](own, *args[1:], **kwargs)

    return LazyRows.of(first.shape, first, first.chunk_rows, make, fresh=True)


def _applied(func: Any, args: Any, kwargs: Any, start: int, stop: int) -> Tensor:
    arguments, keywords = tree_map_only(LazyRows, lambda t: t.rows(start, stop), (args, kwargs))
    result: Tensor = func(*arguments, **keywords)
    return result
