"""Dropout of the weights: read off with values that are unit vectors, so that the output is the weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import memsave
from memsave.nn.sparse_attention import selecting
from memsave.nn.sparse_attention.function import attend, kept_bytes
from memsave.ops.selected_attention import blocks

from .toys import Case, choice, codebook, gradients, inputs, sight

SHARE = 0.3
CASE = Case(80, 80, is_causal=True, values=80)
by_granularity = pytest.mark.parametrize("granularity", ["token", "block"])


def unit_inputs() -> list[Tensor]:
    """q, k, v (B, kv, S, S) and an upstream gradient; value s is the unit vector of key s."""
    q, k, v, upstream = inputs(CASE)
    with torch.no_grad():
        v.copy_(torch.eye(80, dtype=v.dtype))
    return [q, k, v, upstream]


def attention(tensors: list[Tensor], granularity: str, dropout: float, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return attend(*tensors[:3], codebook(CASE), choice(granularity), sight(CASE), None, dropout)


@by_granularity
@pytest.mark.parametrize("chunk_bytes", [None, 1])
def test_weights_are_dropped_and_the_others_scaled(
    granularity: str, chunk_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where queries come in many parts: every part draws numbers of its own, the same in backward."""
    if chunk_bytes is not None:
        monkeypatch.setattr(selecting, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(blocks, "CHUNK_BYTES", chunk_bytes)
    tensors = unit_inputs()
    whole, dropped = attention(tensors, granularity, 0.0), attention(tensors, granularity, SHARE)
    there = whole > 1e-9
    factors = torch.where(there, dropped / whole.clamp(min=1e-12), 0.0).detach()
    kept = factors > 0
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - SHARE)))
    share = 1 - kept.sum() / there.sum()
    assert abs(share - SHARE) < 4 * (SHARE * (1 - SHARE) / there.sum()).sqrt()
    rows = kept[0, 0][there[0, 0].sum(-1) > 8]  # another draw for each query
    assert len(torch.unique(rows, dim=0)) == len(rows)

    q, k, v = tensors[:3]
    scores = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).masked_fill(~there, float("-inf"))
    expected = (scores.softmax(-1) * factors) @ v.repeat_interleave(2, 1)
    wanted = gradients(expected, tensors[:3], tensors[3])
    for mine, theirs in zip(gradients(dropped, tensors[:3], tensors[3]), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@by_granularity
def test_equal_seeds_drop_the_same(granularity: str) -> None:
    tensors = unit_inputs()
    first = attention(tensors, granularity, SHARE)
    assert torch.equal(first, attention(tensors, granularity, SHARE))
    assert not torch.equal(first, attention(tensors, granularity, SHARE, seed=4))


@by_granularity
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_again(granularity: str, use_reentrant: bool) -> None:
    tensors = unit_inputs()
    wanted = gradients(attention(tensors, granularity, SHARE), tensors[:3], tensors[3])
    torch.manual_seed(3)
    see, book, how = sight(CASE), codebook(CASE), choice(granularity)
    y = checkpoint(
        lambda q, k, v: attend(q, k, v, book, how, see, None, SHARE), *tensors[:3], use_reentrant=use_reentrant
    )
    y.backward(tensors[3])
    assert all(torch.equal(t.grad, theirs) for t, theirs in zip(tensors[:3], wanted, strict=True))


@by_granularity
def test_a_seed_is_kept_besides(granularity: str) -> None:
    tensors = unit_inputs()
    kept = memsave.saved_bytes(lambda: attention(tensors, granularity, SHARE))
    book = codebook(CASE)
    shapes = [tuple(t.shape) for t in tensors[:3]]
    assert kept == kept_bytes(*shapes, torch.float64) + 8 + book.nbytes
