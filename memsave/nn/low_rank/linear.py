"""A linear whose weight is held as two factors, and the pieces of its work that streaming modules call.

x is (..., D), N rows; first (R, D), second (O, R), bias (O,); the latent x first^T is (..., R); y (..., O):

    y = (x first^T) second^T + bias

With `heads` the outputs are blocks, each with R latents of its own: first (heads * R, D), second (heads, O / heads, R).
Source: FlashSVD, arXiv 2508.01506.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..eager import autocast_enabled, plain
from .lazy_rows import LazyRows, chunk_rows, filled, kept_for_later, piece_bytes, rows_of


class LowRankLinear(nn.Module):
    """`nn.Linear` or `Conv1D` with factors in the place of the weight.

    Args:
        in_features, out_features, rank: D, O and R.
        heads: into how many blocks the outputs are divided, for factors per head; None for one pair of factors.
        transposed: whether the weight that the factors stand for is stored as `Conv1D` does, (D, O).

    Attributes:
        lazy: whether the module around it takes its output as rows that are not made yet; see `rows.py`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        heads: int | None = None,
        transposed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.heads, self.transposed, self.lazy = heads, transposed, False
        blocks = (out_features, rank) if heads is None else (heads, out_features // heads, rank)
        self.first = nn.Parameter(torch.empty((heads or 1) * rank, in_features, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(blocks, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def weight(self) -> FactoredWeight:
        """What stands for the weight of a plain linear: its dtype, shape and device, and its values where used."""
        return FactoredWeight(self)

    @property
    def latent_features(self) -> int:
        """The width of what `project` gives."""
        return self.first.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        # Without autocast the latent and the output have the dtype of x.
        streams = not (torch.is_grad_enabled() or self.training or plain(x) or autocast_enabled(x))
        if (
            self.lazy
            and streams
            and x.dtype == self.first.dtype
            and prod(x.shape[:-1]) > (rows := chunk_rows(self.out_features, x, piece_bytes(self)))
        ):
            return self._later(x, rows)
        if isinstance(x, LazyRows):
            return filled(self._shape(x), x, x.chunk_rows, lambda start, stop: self._map(x.take_rows(start, stop)))
        return self._map(x)

    def _later(self, x: Tensor, rows: int) -> LazyRows:
        source, check = kept_for_later(x)

        def make(start: int, stop: int) -> Tensor:
            check()
            return self._map(rows_of(source, start, stop))

        return LazyRows.of(self._shape(x), x, rows, make, fresh=True)

    def _map(self, x: Tensor) -> Tensor:
        return self.expand(self.project(x))

    def _shape(self, x: Tensor) -> torch.Size:
        return torch.Size((*x.shape[:-1], self.out_features))

    def project(self, x: Tensor) -> Tensor:
        """(..., D) -> the latent (..., R), or (..., heads * R)."""
        if x.dtype != self.first.dtype and not autocast_enabled(x):
            x = x.to(self.first.dtype)  # as T5 does itself where it sees a weight that is a tensor
        return F.linear(x, self.first)

    def expand(self, latent: Tensor, features: Sequence[slice] | None = None) -> Tensor:
        """The latent (..., R) -> y (..., O), or the chosen features of it, in their order.

        With `heads`, each slice of features must be whole blocks.
        """
        if self.heads is not None:
            return self._expand_heads(latent, features)
        if features is None:
            return F.linear(latent, self.second, self.bias)
        second = _rows(self.second, features)
        return F.linear(latent, second, None if self.bias is None else _rows(self.bias, features))

    def _expand_heads(self, latent: Tensor, features: Sequence[slice] | None) -> Tensor:
        assert self.heads is not None
        width = self.out_features // self.heads
        second: Tensor = self.second
        bias: Tensor | None = self.bias
        latent = latent.unflatten(-1, (self.heads, self.rank))  # (..., heads, R)
        if features is not None:
            blocks = [slice(part.start // width, part.stop // width) for part in features]
            second = _rows(second, blocks)
            latent = (
                torch.cat([latent[..., part, :] for part in blocks], -2) if blocks[1:] else latent[..., blocks[0], :]
            )
            bias = None if bias is None else _rows(bias, features)
        y = torch.einsum("...hr,hor->...ho", latent, second).flatten(-2)  # (..., O)
        return y if bias is None else y + bias

    def accumulate(self, total: Tensor, x: Tensor, columns: slice) -> None:
        """Add to total (N, R) what the features `columns` of the input, x (N, C), give to the latent."""
        total.addmm_(x, self.first[:, columns].t())

    def dense_weight(self) -> Tensor:
        """second first, (O, D), or (D, O) if transposed; the product is made in float32 at least."""
        wide = torch.promote_types(self.first.dtype, torch.float32)
        first, second = self.first.to(wide), self.second.to(wide)
        if self.heads is not None:
            first = first.unflatten(0, (self.heads, self.rank))  # (heads, R, D)
        dense = (second @ first).reshape(self.out_features, self.in_features)
        return (dense.t().contiguous() if self.transposed else dense).to(self.first.dtype)

    def extra_repr(self) -> str:
        per_head = "" if self.heads is None else f", heads={self.heads}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
        return f"{sizes}{per_head}, bias={self.bias is not None}"


class FactoredWeight:
    """Stands for the dense weight of a `LowRankLinear`, whose values are made only by what asks for them.

    Some models look at the dtype of a linear's weight in every forward. It is no tensor, so that nobody takes a copy
    that is written to for the weight itself: torch's functions compute with the dense weight, and assignments fail.
    """

    __slots__ = ("_linear",)

    def __init__(self, linear: LowRankLinear) -> None:
        self._linear = linear

    @property
    def dtype(self) -> torch.dtype:
        return self._linear.first.dtype

    @property
    def device(self) -> torch.device:
        return self._linear.first.device

    @property
    def requires_grad(self) -> bool:
        return self._linear.first.requires_grad

    @property
    def shape(self) -> torch.Size:
        o, d = self._linear.out_features, self._linear.in_features
        return torch.Size((d, o) if self._linear.transposed else (o, d))

    @property
    def ndim(self) -> int:
        return 2

    def dim(self) -> int:
        return 2

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dense(self) -> Tensor:
        """The weight as a tensor."""
        return self._linear.dense_weight()

    def __getitem__(self, index: Any) -> Tensor:
        return self.dense()[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _in_place(name := getattr(func, "__name__", "")):
            raise AttributeError(_no_weight(name))
        args = tuple(arg.dense() if isinstance(arg, FactoredWeight) else arg for arg in args)
        kwargs = {k: v.dense() if isinstance(v, FactoredWeight) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("data", "grad") or _in_place(name):
            raise AttributeError(_no_weight(name))
        return getattr(self.dense(), name)


def _in_place(name: str) -> bool:
    """Whether a function of this name writes to a tensor."""
    return name.endswith("_") and not name.endswith("__")


def _no_weight(name: str) -> str:
    return (
        f"the weight of a LowRankLinear has no {name!r}: it exists only as two factors, `first` and `second`; "
        "weight.dense() makes the product"
    )


def _rows(tensor: Tensor, parts: Sequence[slice]) -> Tensor:
    """The rows of `tensor` that `parts` name, in their order; a view where they follow on each other."""
    joined = [parts[0]]
    for part in parts[1:]:
        if part.start == joined[-1].stop:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return torch.cat([tensor[part] for part in joined]) if len(joined) > 1 else tensor[joined[0]]
