"""Seeds and draws under activation checkpointing and torch.compile: backward must see the rows of forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memsave import ops

N, K = 40, 12


class _SampledProduct(torch.autograd.Function):
    """x @ w with a weight gradient from K of the N rows, as small as it can be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        q = ops.row_inclusion(torch.linalg.vector_norm(x, dim=1), K)
        rows = ops.draw_rows(q, K, ops.new_seed(x))
        ctx.save_for_backward(ops.gather_rows(x, rows), rows, (2.0**32 / q[rows]).float(), w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        kept, rows, scale, w = ctx.saved_tensors
        return dy @ w, ops.sampled_matmul(dy, kept, rows, scale)


def sampled_product(x: Tensor, w: Tensor) -> Tensor:
    return _SampledProduct.apply(x, w)


def checkpointed(use_reentrant: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, w: checkpoint(sampled_product, x, w, use_reentrant=use_reentrant)


WAYS = {
    "eager": sampled_product,
    "checkpoint": checkpointed(False),
    "reentrant_checkpoint": checkpointed(True),
    "aot_eager": torch.compile(sampled_product, backend="aot_eager", fullgraph=True),
    "aot_eager_dynamic": torch.compile(sampled_product, backend="aot_eager", fullgraph=True, dynamic=True),
    "inductor": torch.compile(sampled_product, backend="inductor", fullgraph=True),
}


@pytest.mark.parametrize("way", WAYS)
def test_backward_pairs_each_kept_row_with_its_own_gradient(way: str) -> None:
    """Row n of x is the unit vector n and row n of dy is n + 1, so column n of dW is 0 or a multiple of n + 1."""
    x, w = torch.eye(N, requires_grad=True), torch.zeros(2, N, requires_grad=True)
    dy = torch.arange(1.0, N + 1)[:, None].expand(N, 2)
    WAYS[way](x, w).backward(dy)
    assert w.grad is not None
    per_row = w.grad / torch.arange(1.0, N + 1)
    drawn = per_row[0].nonzero().flatten()
    assert len(drawn) == K
    assert torch.allclose(per_row[:, drawn], torch.full((2, K), N / K))


@pytest.mark.parametrize("way", ["eager", "aot_eager"])
def test_the_default_generator_decides(way: str) -> None:
    def gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        x, w = torch.eye(N, requires_grad=True), torch.zeros(2, N, requires_grad=True)
        WAYS[way](x, w).sum().backward()
        assert w.grad is not None
        return w.grad

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


def test_a_seed_is_a_non_negative_number_on_the_device_of_its_model_tensor() -> None:
    seeds = torch.stack([ops.new_seed(torch.ones(1)) for _ in range(200)])
    assert seeds.dtype == torch.int64 and int(seeds.min()) >= 0
    assert len(set(seeds.tolist())) == 200
    assert int(seeds.max()) > 2**62  # all 63 bits are used
    assert ops.new_seed(torch.ones(1, requires_grad=True)).shape == ()
    assert torch.Tag.nondeterministic_seeded in torch.ops.memsave.new_seed.default.tags
