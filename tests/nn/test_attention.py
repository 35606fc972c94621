"""Attention: the masks that layers share, and dropout on the CPU against torch's own.

q (B, h, T, D), k and v (B, kv, S, D).
"""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memsave
from memsave.nn import attention_dropout
from memsave.nn.attention import _shared, additive_mask, cpu_attention, shared_mask
from memsave.nn.attention_dropout import attend_with_dropout

B, HEADS, T, S, D = 2, 4, 21, 37, 8


def inputs(kv: int = HEADS, dtype: torch.dtype = torch.float64, keys: int = S) -> list[Tensor]:
    """q, k and v as a transformers model makes them: views of (B, T, h, D)."""
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, HEADS, D), (B, keys, kv, D), (B, keys, kv, D)]
    return [torch.randn(s, generator=g).to(dtype).transpose(1, 2).detach().requires_grad_() for s in shapes]


def padding() -> Tensor:
    """A boolean mask (B, 1, T, S) with a row that sees nothing, and one that sees one key."""
    mask = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0, 0, 3] = False
    mask[1, 0, 5] = torch.arange(S) == 7
    return mask


def bias() -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(1, HEADS, T, S, generator=g, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kv", [HEADS, 2, 1])
@pytest.mark.parametrize("mask", ["none", "boolean", "additive", "bias", "causal"])
@pytest.mark.parametrize("chunk_bytes", [1, T * S * 8 * 3, 2**24])
def test_dropout_is_that_of_torch(kv: int, mask: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same random numbers, output and gradients, whichever heads are computed together."""
    monkeypatch.setattr(attention_dropout, "_CHUNK_BYTES", chunk_bytes)
    q, k, v = inputs(kv)
    made = {"boolean": padding(), "additive": additive_mask(padding(), torch.float64), "bias": bias()}.get(mask)
    upstream = torch.randn(B, HEADS, T, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    results = []
    for ours in (True, False):
        torch.manual_seed(7)
        if ours:
            y = attend_with_dropout(q, k, v, made, 0.3, 0.2, mask == "causal")
        else:
            y = F.scaled_dot_product_attention(q, k, v, made, 0.3, mask == "causal", scale=0.2, enable_gqa=True)
        wanted = [q, k, v, *([made] if mask == "bias" else [])]
        results.append([y, *torch.autograd.grad(y, wanted, upstream), torch.rand(1)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_rounds_no_worse_than_torch(dtype: torch.dtype) -> None:
    exact = inputs(2)
    mask = additive_mask(padding(), torch.float64)
    upstream = torch.randn(B, HEADS, T, D, generator=torch.Generator().manual_seed(3))

    def run(attend: object, dtype: torch.dtype) -> list[Tensor]:
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in rounded)
        torch.manual_seed(7)
        if attend == "ours":
            y = attend_with_dropout(q, k, v, mask.to(dtype), 0.3, None, False)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask.to(dtype), 0.3, enable_gqa=True)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, (q, k, v), upstream.to(dtype))]

    rounded = [t.detach().to(dtype) for t in exact]
    upstream = upstream.to(dtype).double()
    ours, plain, right = run("ours", dtype), run("torch", dtype), run("torch", torch.float64)
    for mine, theirs, true in zip(ours, plain, right, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()


@pytest.mark.parametrize("kv", [HEADS, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_one_bit_per_probability(kv: int, dtype: torch.dtype) -> None:
    q, k, v = inputs(kv, dtype)
    mask = additive_mask(padding(), dtype)
    kept = memsave.saved_bytes(lambda: cpu_attention(q, k, v, mask, dropout=0.1))
    assert kept == q.nbytes + k.nbytes + v.nbytes + mask.nbytes + B * HEADS * T * ((S + 7) // 8)


@pytest.mark.parametrize("kv", [HEADS, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_without_dropout_grouped_heads_are_not_repeated(kv: int, dtype: torch.dtype, masked: bool) -> None:
    q, k, v = inputs(kv, dtype)
    mask = additive_mask(padding(), dtype) if masked else None
    kept = memsave.saved_bytes(lambda: cpu_attention(q, k, v, mask))
    statistic = 4 * B * HEADS * T
    assert kept == 2 * q.nbytes + k.nbytes + v.nbytes + statistic + (mask.nbytes if mask is not None else 0)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_computes_in_its_dtype(dropout: float) -> None:
    q, k, v = inputs(2, torch.float32)
    outputs = []
    with torch.autocast("cpu", torch.bfloat16):
        for attend in (cpu_attention, partial(F.scaled_dot_product_attention, enable_gqa=True)):
            torch.manual_seed(0)
            name = "dropout" if attend is cpu_attention else "dropout_p"
            outputs.append(attend(q, k, v, additive_mask(padding(), torch.bfloat16), **{name: dropout}))
    assert outputs[0].dtype == torch.bfloat16
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_additive_mask_gives_the_bits_of_the_boolean_one(dropout: float) -> None:
    q, k, v = inputs(dtype=torch.float32)
    results = []
    for mask in (padding(), additive_mask(padding(), torch.float32)):
        torch.manual_seed(0)
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        results.append([y, *torch.autograd.grad(y.sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][0][0, :, 3] == 0).all()


def test_rows_that_a_mask_repeats_take_no_memory() -> None:
    keys = torch.rand(B, 1, 1, S, generator=torch.Generator().manual_seed(0)) > 0.3
    made = additive_mask(keys.expand(B, 1, T, S), torch.float32)
    assert made.shape == (B, 1, T, S) and made.untyped_storage().nbytes() == 4 * B * S
    assert torch.equal(made == 0, keys.expand(B, 1, T, S)) and made[made != 0].eq(float("-inf")).all()


def test_on_an_accelerator_rows_start_where_its_kernels_want_them() -> None:
    made = additive_mask(torch.ones(B, 1, T, S, dtype=torch.bool, device="meta"), torch.bfloat16)
    assert made.shape == (B, 1, T, S) and made.stride() == (T * 48, T * 48, 48, 1)


class Layers:
    """Layers that read one boolean mask; `masks` are the additive ones that they were given."""

    def __init__(self) -> None:
        self.mask = padding()
        self.masks: list[int] = []

    def forward(self, count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
        q, k, v = inputs(dtype=dtype)
        y = torch.zeros((), dtype=dtype)
        for _ in range(count):
            shared = shared_mask(self.mask, (dtype,), partial(additive_mask, self.mask, dtype))
            assert shared.mask is not None
            self.masks.append(shared.mask.untyped_storage()._cdata)
            one = cpu_attention(q, k, v, shared.mask)
            shared.hold_with(one)
            y = y + one.sum()
        return y


def test_layers_share_a_mask_until_the_backward() -> None:
    layers = Layers()
    for _ in range(2):
        layers.masks.clear()
        y = layers.forward(3)
        assert len(layers.masks) == 3 and len(set(layers.masks)) == 1
        y.backward()


def test_a_further_layer_keeps_no_further_mask() -> None:
    layers = Layers()
    kept = [memsave.saved_bytes(partial(layers.forward, count)) for count in (1, 2)]
    output_and_statistic = 4 * B * HEADS * T * (D + 1)
    own_inputs = sum(t.nbytes for t in inputs(dtype=torch.float32))
    assert kept[0] == own_inputs + output_and_statistic + 4 * layers.mask.numel()
    assert kept[1] == kept[0] + output_and_statistic


def _entries(mask: Tensor) -> list[Any]:
    return list(_shared[mask].values())


def test_nothing_is_held_once_the_graph_is_gone() -> None:
    layers = Layers()
    y = layers.forward()
    (entry,) = _entries(layers.mask)
    assert entry() is not None
    del y
    gc.collect()
    assert entry() is None


def test_nothing_is_held_after_backward_though_the_output_lives() -> None:
    layers = Layers()
    y = layers.forward()
    (entry,) = _entries(layers.mask)
    y.backward()
    assert entry() is None or entry().mask is None


def test_nothing_is_held_under_hooks_that_take_over_what_is_kept() -> None:
    layers = Layers()
    with torch.autograd.graph.save_on_cpu():
        y = layers.forward()
    (entry,) = _entries(layers.mask)
    assert y.requires_grad and entry() is None


def test_a_mask_that_was_changed_or_is_wanted_in_another_dtype_is_made_again() -> None:
    layers = Layers()
    kept = [layers.forward(1), layers.forward(1, torch.bfloat16)]
    layers.mask[0, 0, 0] = False
    kept.append(layers.forward(1))
    assert len(set(layers.masks)) == 3 and len(kept) == 3


def test_a_mask_made_of_two_tensors_is_shared_by_the_same_two_only() -> None:
    first, second = bias().float().detach(), padding()
    made: list[Tensor] = []

    def shared(beside: Tensor | None) -> object:
        def make() -> Tensor:
            made.append(first.clone())
            return made[-1]

        return shared_mask(first, (), make, beside)

    held = [shared(second), shared(second), shared(padding()), shared(None)]
    assert held[0] is held[1] and len(made) == 3
