"""Attention and feed-forward modules that no package has, budgets by which they stream, and what is counted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import memsave
from memsave import FlashSVDConfig, Report
from memsave.nn.low_rank import heads, lazy_rows
from memsave.nn.low_rank.group_run import Run
from memsave.nn.low_rank.lazy_rows import LazyRows

WIDTH = 32


class Attention(nn.Module):
    """Projections of their own, the number of heads in its view; grouped queries with fewer key/value heads."""

    def __init__(self, num_heads: int = 4, num_kv_heads: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, WIDTH // num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.scale = self.head_dim**-0.5
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.k_proj = nn.Linear(WIDTH, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(WIDTH, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, self.num_kv_heads, self.head_dim).transpose(1, 2)
        k, v = (each.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for each in (k, v))
        return self.o_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) * self.scale
        masked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(masked, float("-inf")).softmax(-1) @ v


class ScaledInForward(Attention):
    """The scale of its scores is taken from the size of a head, which must then not change."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class NormedHeads(Attention):
    """Queries and keys are normalized: their features are not a matter of basis and size."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:]), v)


class TalkingHeads(Attention):
    """Each head's scores are mixed with the others'."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(4) + 0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhts,hg->bgts", q @ k.transpose(2, 3), self.mix)
        return scores.softmax(-1) @ v


class FusedAttention(nn.Module):
    """One projection to queries, keys and values; it knows its heads, not their size."""

    def __init__(self, num_heads: int = 4) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Llama's."""

    def __init__(self, hidden: int = 96, width: int = WIDTH) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """OPT's: the linears of the feed-forward block are the layer's own."""

    def __init__(self, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.attn = attention or Attention()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.fc2(F.gelu(self.fc1(x)))


class Wide(nn.Module):
    """BERT's `intermediate`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, 96)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Back(nn.Module):
    """BERT's `output`."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(96, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dense(x) + residual)


class TwoModules(nn.Module):
    """BERT's feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.intermediate, self.output = Wide(), Back()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


def small_budgets(monkeypatch: pytest.MonkeyPatch, chunk_rows: int = 5) -> None:
    """Every key/value head is a group, and every chunk has so many tokens."""
    monkeypatch.setitem(heads.GROUP_BYTES, "cpu", 1)
    monkeypatch.setitem(lazy_rows.CHUNK_BYTES, "cpu", 1)
    monkeypatch.setattr(lazy_rows, "MIN_CHUNK_ROWS", chunk_rows)


def low_rank_pair(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A low-rank model that holds the module without streaming, with it, and the report of that."""
    models: list[Any] = []
    reports: list[Report] = []
    for fuse in (False, True):
        torch.manual_seed(0)
        models.append(nn.Sequential(make()).to(dtype).eval())
        config = FlashSVDConfig(**{"target_modules": r".*", "rank": 4, **settings, "fuse": fuse})
        reports.append(memsave.convert_model(models[-1], config))
    return (*models, reports[1])


def tokens(*leading: int, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> Tensor:
    return torch.randn(*leading, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@contextmanager
def counted_groups() -> Iterator[list[tuple[bool, int]]]:
    """Of every attention that runs by groups: whether in rank space, and in how many."""
    found: list[tuple[bool, int]] = []
    by_groups = Run.by_groups

    def count(run: Run, groups: Any, *args: Any) -> Any:
        found.append((run.absorbed, len(groups)))
        return by_groups(run, groups, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "by_groups", count)
        yield found


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator made; rows to come are none."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        views = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _real(t)}
        for t in tree_leaves(result):
            if _real(t) and t.untyped_storage()._cdata not in views:
                self.made.append(tuple(t.shape))
        return result

    def shapes_of(self, elements: int) -> list[tuple[int, ...]]:
        """Of the tensors that have at least so many elements."""
        return [shape for shape in self.made if torch.Size(shape).numel() >= elements]


def flops_of(module: nn.Module, x: Tensor) -> int:
    """Of the matrix products in a forward; torch does not count those that add to a tensor in place."""

    def added(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        module(x)
    return counter.get_total_flops()


def _real(value: object) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, LazyRows)
