"""Attention to chosen keys, differentiable.

query (B, h, T, D), key (B, kv, S, D), value (B, kv, S, E), codebook (kv, M, C, d). Kept for backward: query, key,
value, the output and one number for each of its rows, as by torch's fused attention; no list of keys. Lists are
made again in backward from the same integers, for some queries at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ... import ops
from ...ops.selected_attention import tiled
from ...ops.selected_attention.blocks import Dropping
from ...ops.selected_attention_backward import tiled as tiled_backward
from ..attention import dtype_of_attention
from ..eager import no_autocast, once_differentiable
from .selecting import Choice, Visibility, choose, chunk_rows


@torch.compiler.disable
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    codebook: Tensor,
    choice: Choice,
    see: Visibility,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q k^T) v over the chosen keys: (B, h, T, E), whose memory is that of (B, T, h, E).

    With `dropout` in (0, 1), that share of the weights is dropped, as in torch's attention, by plain PyTorch on every
    device; a seed is drawn from torch's generator and kept for backward.

    The codebook gets no gradient, and nothing reaches queries or keys through the choice. A query that sees no key
    gives zeros. Computed in the dtype that torch's attention would take under autocast.
    """
    dtype = dtype_of_attention(query)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    with no_autocast(query):
        seed = ops.new_seed(query) if dropout else None
        settings = choice, see._replace(mask=None), scale, dropout
        output: Tensor = _Attention.apply(query, key, value, codebook, see.mask, seed, settings)
    return output


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        codebook: Tensor,
        mask: Tensor | None,
        seed: Tensor | None,
        settings: tuple[Choice, Visibility, float, float],
    ) -> Tensor:
        choice, see, scale, dropout = settings
        attention = ops.selected_attention if seed is None else tiled.selected_attention
        batch, heads, rows, _ = query.shape
        output = query.new_empty(batch, rows, heads, value.shape[3]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, rows, dtype=torch.promote_types(query.dtype, torch.float32))
        for part, lists, given in _parts(query, key, codebook, mask, choice, see, scale):
            output[:, :, part], logsumexp[:, :, part] = attention(
                query[:, :, part], key, value, lists, *given, *_dropping(seed, dropout, part)
            )
        ctx.settings = settings
        ctx.save_for_backward(query, key, value, codebook, mask, seed, output, logsumexp)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, doutput: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, codebook, mask, seed, output, logsumexp = ctx.saved_tensors
        choice, see, scale, dropout = ctx.settings
        differentiate = ops.selected_attention_backward
        if seed is not None:
            differentiate = tiled_backward.selected_attention_backward
        dquery = torch.empty_like(query)
        dkey, dvalue = (torch.zeros(t.shape, dtype=logsumexp.dtype, device=t.device) for t in (key, value))
        with no_autocast(query):
            for part, lists, (shown, *given) in _parts(query, key, codebook, mask, choice, see, scale):
                dquery[:, :, part] = differentiate(
                    *(doutput[:, :, part], query[:, :, part], key, value, lists, shown, output[:, :, part]),
                    *(logsumexp[:, :, part], dkey, dvalue, *given, *_dropping(seed, dropout, part)),
                )
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None, None, None, None


def _dropping(seed: Tensor | None, dropout: float, part: slice) -> tuple[Dropping, ...]:
    """Which weights of some queries are dropped: an argument, or none. The same ones for the same seed."""
    if seed is None:
        return ()
    generator = torch.Generator(seed.device)
    generator.manual_seed(0 if is_fake(seed) else (int(seed) + part.start) % 2**63)
    return (Dropping(dropout, generator),)


def _parts(
    query: Tensor, key: Tensor, codebook: Tensor, mask: Tensor | None, choice: Choice, see: Visibility, scale: float
) -> Iterator[tuple[slice, Tensor, tuple[Any, ...]]]:
    """Some queries at a time, the lists of their keys, and what the ops take besides: mask to scale."""
    codes = ops.pq_encode(key, codebook)
    step = chunk_rows(query, key, codebook, choice)
    whole = see._replace(mask=mask)
    for start in range(0, query.shape[2], step):
        part = slice(start, min(query.shape[2], start + step))
        lists = choose(query, part, codes, codebook, choice, whole, scale)
        here = whole.of_rows(part)
        if choice.granularity == "token":  # the lists hold what is visible, and nothing else
            here = Visibility(None, False, 0, 0, see.local)
        yield part, lists, (here.mask, here.is_causal, here.window, here.position, choice.size, scale)


def kept_bytes(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that `attend` keeps for backward, from the shapes of its tensors: what torch's fused attention keeps.

    Query, key, value, the output (B, h, T, E), and a number of at least float32 for each of its rows; 8 more with
    dropout.
    """
    rows = prod(query[:3])
    statistics = rows * torch.promote_types(dtype, torch.float32).itemsize
    return (prod(query) + prod(key) + prod(value) + rows * value[3]) * dtype.itemsize + statistics
