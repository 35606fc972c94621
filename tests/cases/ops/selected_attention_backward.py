"""Rows of `selected_attention_backward`, which rounds: float64 and the error of plain PyTorch bound the error.

Those of `selected_attention`, with gradients of its outputs. Shapes as there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from tests.harness import OpCase, OpSpec

from . import selected_attention
from .inputs import generator, strided
from .selected_attention import NONE, arguments, exponentials, visible, wider

ORDER = "doutput query key value indices mask output logsumexp dkey dvalue".split()


def oracle(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the scores of one head at a time, in float64 or more, from the inputs of the forward pass alone."""
    tensors = dict(zip(ORDER, args, strict=False))
    *how, scale = args[len(ORDER) :]
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    seen = visible(query, key, tensors["indices"], tensors["mask"], *how).numpy()
    q, k, v, dy = (wider(tensors[name]) for name in ("query", "key", "value", "doutput"))
    repeats = query.shape[1] // key.shape[1]
    dq = numpy.zeros(query.shape)
    dk, dv = (wider(tensors[name]).copy() for name in ("dkey", "dvalue"))
    for b, i in numpy.ndindex(query.shape[:2]):
        g = i // repeats
        p, _, total = exponentials(q[b, i] @ k[b, g].T * scale, seen[b, i])
        p = p / numpy.maximum(total, 1)
        dp = dy[b, i] @ v[b, g].T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
        dq[b, i] = ds @ k[b, g]
        dk[b, g] += ds.T @ q[b, i]
        dv[b, g] += p.T @ dy[b, i]
    return torch.from_numpy(dq), torch.from_numpy(dk.astype(float)), torch.from_numpy(dv.astype(float))


def plain(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same from dense scores in the dtype of query, with the output and log-sum-exp of the forward pass, which are
    rounded; added up in the dtype of dkey, one query after another as a kernel may."""
    tensors = dict(zip(ORDER, args, strict=False))
    *how, scale = args[len(ORDER) :]
    dy, q, key, value, output = (tensors[name] for name in ("doutput", "query", "key", "value", "output"))
    seen = visible(q, key, tensors["indices"], tensors["mask"], *how)
    repeats = q.shape[1] // key.shape[1]
    k, v = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    shift = tensors["logsumexp"][..., None]
    p = ((q @ k.mT * scale) - shift.masked_fill(shift == NONE, 0.0)).exp().masked_fill(~seen, 0.0).to(q.dtype)
    ds = p * (dy @ v.mT - (dy * output).sum(-1, keepdim=True)) * scale
    dk, dv = tensors["dkey"].clone(), tensors["dvalue"].clone()
    for r in range(q.shape[2]):
        for i in range(repeats):
            ds_row, q_row, p_row, dy_row = (x[:, i::repeats, r, None] for x in (ds, q, p, dy))
            dk += ds_row.mT.to(dk.dtype) * q_row
            dv += p_row.mT.to(dv.dtype) * dy_row
    return ds @ k, dk, dv


SPEC = OpSpec("selected_attention_backward", oracle, plain, exact=False, writes=(8, 9))


def with_gradients(make: Callable[[], tuple[Any, ...]], spread: bool = False) -> tuple[Any, ...]:
    """The arguments of the backward for those of the forward. Gradients have signs, dkey and dvalue hold something.

    With `spread` every tensor that may have gaps in memory has some.
    """
    query, key, value, indices, mask, *how = make()
    wide = torch.promote_types(query.dtype, torch.float32)
    output, logsumexp = selected_attention.oracle(query, key, value, indices, mask, *how)
    drawn = generator(9)
    doutput = torch.randn(output.shape, generator=drawn).to(query.dtype)
    sums = [torch.randn(x.shape, generator=drawn).to(wide) for x in (key, value)]
    output, logsumexp = output.to(query.dtype), logsumexp.to(wide)
    if spread:
        doutput, output, logsumexp = strided(doutput), strided(output), strided(logsumexp)
    elif not query.is_contiguous():  # as a module's output comes
        doutput = doutput.transpose(1, 2).contiguous().transpose(1, 2)
    return doutput, query, key, value, indices, mask, output, logsumexp, *sums, *how


def expanded_gradient() -> tuple[Any, ...]:
    """That of a sum: one number in memory."""
    _, *rest = with_gradients(partial(arguments, block_size=4))
    return torch.ones(1, 1, 1, 1).expand(2, 4, 19, 16), *rest


def negative_gradients() -> tuple[Any, ...]:
    """All below zero, and so are products with the output."""
    doutput, query, key, value, *rest = with_gradients(partial(arguments, block_size=4, R=9))
    value, rest[2] = value.abs(), torch.empty(0)
    output, _ = selected_attention.oracle(query, key, value, rest[0], rest[1], *rest[6:])
    rest[2] = output.float()
    return -doutput.abs(), query, key, value, *rest


CASES = [
    *(
        OpCase(SPEC, name, partial(with_gradients, make, spread=name.startswith("strided")), large)
        for name, make, large in selected_attention.rows()
    ),
    OpCase(SPEC, "expanded_gradient", expanded_gradient),
    OpCase(SPEC, "negative_gradients", negative_gradients),
]
