"""Where tokens go: probabilities of the blocks, the best of them for each token, and tokens sorted by block.

x is (N, D); p (N, G), the softmax of the router's scores, in float32 or wider; k blocks are active. Source: SPT,
arXiv 2312.10365; the loss that balances blocks: Switch Transformers, arXiv 2101.03961.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..eager import no_autocast, once_differentiable

INITIAL_SCALE = 0.1
"""Standard deviation of a new router's scores, for inputs whose features have mean square 1."""
_ENTRIES_AT_ONCE = 2**20  # of a half-precision input, turned to float32


class Router(nn.Module):
    """p (N, G) of x (N, D), computed in float32 or wider also under autocast; keeps x and p for backward.

    It is no `nn.Linear`: what converts linears, quantizes them or adds adapters must leave it as it is.
    """

    def __init__(self, features: int, blocks: int, *, device: torch.device | None = None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(blocks, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Small random scores: equal ones would send every token to the same blocks, and train no other."""
        nn.init.normal_(self.weight, std=INITIAL_SCALE / self.weight.shape[1] ** 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return _Probabilities.apply(x, self.weight, self.bias)

    def reference(self, x: Tensor) -> Tensor:
        """The same in plain autograd."""
        wide = _wide(x)
        with no_autocast(x):
            return F.linear(x.to(wide), self.weight.to(wide), self.bias.to(wide)).softmax(-1)

    def extra_repr(self) -> str:
        return f"in_features={self.weight.shape[1]}, blocks={self.weight.shape[0]}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _in_pieces(x: Tensor) -> Iterator[slice]:
    """Slices of rows: all at once, except that a half-precision x is widened some rows at a time."""
    rows = len(x) if x.dtype == _wide(x) else _ENTRIES_AT_ONCE // x.shape[1]
    return (slice(start, start + max(rows, 1)) for start in range(0, len(x), max(rows, 1)))


class _Probabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = _wide(x)
        p = x.new_empty((len(x), len(weight)), dtype=wide)
        with no_autocast(x):
            w, b = weight.to(wide), bias.to(wide)
            for rows in _in_pieces(x):
                p[rows] = F.linear(x[rows].to(wide), w, b).softmax(-1)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, p)
        ctx.dtypes = x.dtype, weight.dtype
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, p = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        dx = dweight = dbias = None
        with no_autocast(dp):
            dscores = p * (dp - (dp * p).sum(-1, keepdim=True))  # (N, G)
            if ctx.needs_input_grad[0]:
                dx = dscores.to(x_dtype) @ weight.to(x_dtype)
            if ctx.needs_input_grad[1]:
                dweight = p.new_zeros((p.shape[1], x.shape[1]))
                for rows in _in_pieces(x):
                    dweight.addmm_(dscores[rows].t(), x[rows].to(p.dtype))
                dweight = dweight.to(weight_dtype)
            if ctx.needs_input_grad[2]:
                dbias = dscores.sum(0).to(weight_dtype)
        return dx, dweight, dbias


class Dispatch(NamedTuple):
    """Which tokens each block gets.

    Attributes:
        tokens: (N * k,) int32: those of block 0 in their order, those of block 1, and so on.
        counts: (G,) int32: how many each block gets.
    """

    tokens: Tensor
    counts: Tensor


def chosen_blocks(p: Tensor, active: int) -> Tensor:
    """(N, G) bool: the `active` most probable blocks of each token; of equal ones the first."""
    if active == p.shape[1]:
        return torch.ones_like(p, dtype=torch.bool)
    best = p.sort(dim=-1, descending=True, stable=True).indices[:, :active]
    return torch.zeros_like(p).scatter(1, best, 1.0).bool()


def dispatch(chosen: Tensor, active: int) -> Dispatch:
    """The tokens sorted by block, by counting: stable, and without waiting for the device. `chosen` is (N, G) bool."""
    num_tokens, blocks = chosen.shape
    ranks = chosen.cumsum(0, dtype=torch.int32)  # (N, G): how many tokens up to this one the block got
    counts = ranks[-1].clone() if num_tokens else ranks.new_zeros(blocks)
    ends = counts.cumsum(0, dtype=torch.int32)
    # One place more than needed takes what is not chosen.
    places = torch.where(chosen, ranks - 1 + (ends - counts), num_tokens * active)
    numbers = torch.arange(num_tokens, dtype=torch.int32, device=chosen.device)
    tokens = ranks.new_empty(num_tokens * active + 1)
    tokens.scatter_(0, places.reshape(-1).long(), numbers.repeat_interleave(blocks))
    return Dispatch(tokens[:-1].clone(), counts)


def spans(counts: Tensor, total: int) -> list[slice]:
    """The places of each block's tokens among `total` sorted ones. Tensors without values count as balanced."""
    if is_fake(counts) or counts.is_meta:
        share, rest = divmod(total, len(counts))
        sizes = [share + (block < rest) for block in range(len(counts))]
    else:
        sizes = counts.tolist()
    ends = [sum(sizes[: block + 1]) for block in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class Balance:
    """The loss that balances blocks, alpha G sum_i f_i P_i: f_i is block i's share of the tokens, P_i its mean p.

    Attributes:
        alpha: its weight.
        scale: by which its gradient is multiplied; read when backward runs.
        load: (G,), the f of the latest forward; None before.
        value: the loss of the latest forward; None before.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.scale = 1.0
        self.load: Tensor | None = None
        self.value: Tensor | None = None

    @torch.no_grad()
    def note(self, p: Tensor, counts: Tensor) -> None:
        """Remember what the latest forward did. Not added up: checkpointing runs a forward twice."""
        self.load = self.shares(counts, p.dtype)
        mean = p.detach().sum(0) / max(1, p.shape[0])
        self.value = self.alpha * p.shape[1] * (self.load * mean).sum()

    @staticmethod
    def shares(counts: Tensor, dtype: torch.dtype) -> Tensor:
        """f (G,)."""
        return counts.to(dtype) / counts.sum().clamp(min=1)

    def gradient(self, counts: Tensor, p: Tensor) -> Tensor:
        """(G,): that of each token's p (N, G)."""
        return self.shares(counts, p.dtype) * (self.scale * self.alpha * p.shape[1] / max(1, p.shape[0]))
