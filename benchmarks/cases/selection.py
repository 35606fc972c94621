"""The benchmark cases of the ops of sparse attention: keys chosen by product quantization, and attention to them.

One sequence of S tokens, h query and kv key/value heads of D features, 8 subspaces of 16 codewords. A `block_size` of 1
keeps S / 8 single keys for each query, others as many keys in blocks; all causal, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memsave import ops
from tests.harness import assert_same

from .op_case import Contender, Inputs, OpCase, sizes

BF16, FP32 = torch.bfloat16, torch.float32
SUBSPACES, CODEWORDS, SHARE = 8, 16, 8
_s = sizes("S", "h", "kv", "D", "block_size", "dtype")
_LLAMA = ((4096, 32, 8, 128, 1, BF16), (4096, 32, 8, 128, 64, BF16), (32768, 32, 8, 128, 64, BF16))
_ON_CPU = ((2048, 8, 8, 64, 1, FP32), (2048, 8, 8, 64, 64, FP32))
_TINY = {"sizes": {device: _s((96, 4, 2, 16, 1, FP32), (96, 4, 2, 16, 16, FP32)) for device in ("cpu", "cuda")}}


def token_inputs(device: str, S: int, h: int, kv: int, D: int, block_size: int, dtype: torch.dtype) -> Inputs:
    """Queries (1, h, S, D), keys and values (1, kv, S, D), gradients, what was chosen, and what was chosen from."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query, doutput = drawn(1, h, S, D).to(dtype), drawn(1, h, S, D).to(dtype)
    key, value = drawn(1, kv, S, D).to(dtype), drawn(1, kv, S, D).to(dtype)
    codebook = drawn(kv, SUBSPACES, CODEWORDS, D // SUBSPACES)
    codes = ops.pq_encode(key, codebook)
    rows = F.pad(query[:, :: h // kv], (0, 0, 0, -S % block_size)).unflatten(2, (-1, block_size)).mean(3)
    table, step = ops.pq_table(rows, codebook)
    levels = torch.arange(256, device=device) - 255
    weights = (2**20 * torch.exp(levels * D**-0.5 * step[..., None])).to(torch.int32)
    inputs: Inputs = {
        **{"query": query, "key": key, "value": value, "doutput": doutput, "codebook": codebook, "codes": codes},
        **{"rows": rows, "table": table, "weights": weights[:, :, :, None], "block_size": block_size},
        **{"keep": max(1, S // SHARE // block_size), "scale": D**-0.5},
    }
    chosen = select(**inputs) if block_size == 1 else select_blocks(**inputs)
    output, logsumexp = attend(indices=chosen, **inputs)
    return inputs | {"indices": chosen, "output": output, "logsumexp": logsumexp}


def encode(key: Tensor, codebook: Tensor, **_: Any) -> Tensor:
    return ops.pq_encode(key, codebook)


def make_table(rows: Tensor, codebook: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return ops.pq_table(rows, codebook)


def select(table: Tensor, codes: Tensor, keep: int, **_: Any) -> Tensor:
    return ops.pq_select(table, codes, None, True, 0, 0, keep)


def select_blocks(table: Tensor, weights: Tensor, codes: Tensor, block_size: int, keep: int, **_: Any) -> Tensor:
    return ops.pq_select_blocks(table[:, :, :, None], weights, codes, None, True, 0, 0, block_size, keep, True)


def attend(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, scale: float, block_size: int, **_: Any
) -> tuple[Tensor, Tensor]:
    return ops.selected_attention(query, key, value, indices, None, block_size > 1, 0, 0, block_size, scale)


def differentiate(
    doutput: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    block_size: int,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in (key, value)]
    given = doutput, query, key, value, indices, None, output, logsumexp, *sums
    dquery = ops.selected_attention_backward(*given, block_size > 1, 0, 0, block_size, scale)
    return dquery, *sums


def dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any) -> Tensor:
    """All keys before each query, none left out."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def dense_step(doutput: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, **_: Any) -> Any:
    """The same with its gradients: forward and backward."""
    with torch.enable_grad():
        given = [x.detach().requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(dense_attention(*given, scale), given, doutput)


def top_of_scores(rows: Tensor, key: Tensor, keep: int, **_: Any) -> Tensor:
    """The largest true scores, without a mask."""
    return (rows.to(key.dtype) @ key.mT).topk(min(keep, key.shape[2]), -1).indices


def same(call: Callable[..., Any]) -> Callable[..., None]:
    """The result of plain PyTorch to the bit."""

    def check(**inputs: Any) -> None:
        with ops.use_reference():
            expected = call(**inputs)
        assert_same(call(**inputs), expected)

    return check


def close(call: Callable[..., Any], roundings: int = 8) -> Callable[..., None]:
    """The result of plain PyTorch, which computes in float32, up to some roundings in the dtype of the keys."""

    def check(**inputs: Any) -> None:
        with ops.use_reference():
            expected = call(**inputs)
        for found, plain in zip(call(**inputs), expected, strict=True):
            tolerance = roundings * torch.finfo(inputs["key"].dtype).eps * max(1.0, float(plain.abs().max()))
            torch.testing.assert_close(found, plain, atol=tolerance, rtol=0)

    return check


def near(call: Callable[..., Any]) -> Callable[..., None]:
    """Integers of plain PyTorch; as both round, a few in 10,000 may be others."""

    def check(**inputs: Any) -> None:
        with ops.use_reference():
            expected = call(**inputs)
        found = call(**inputs)
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for one, other in pairs:
            assert ((one - other).abs() > 1e-4 * other.abs()).double().mean() < 1e-3

    return check


def _case(op: str, title: str, call: Callable[..., Any], check: Callable[..., None], **fields: Any) -> OpCase:
    peers, of = fields.pop("peers", {}), fields.pop("of", _LLAMA)
    return OpCase(
        name=f"op_{op}",
        title=title,
        devices=("cpu", "cuda"),
        inputs=token_inputs,
        contenders=(
            Contender(name="plain PyTorch", call=call, within=ops.use_reference),
            Contender(name="memsave", call=call),
            *(Contender(name=name, call=peer, may_fail=True) for name, peer in peers.items()),
        ),
        check=check,
        sizes={"cpu": _s(*(s for s in _ON_CPU if s[4] in {size[4] for size in of})), "cuda": _s(*of)},
        tiny=fields.pop("tiny", _TINY),
        **fields,
    )


def _tiny(block_size: int) -> dict[str, Any]:
    return {"sizes": {device: _s((96, 4, 2, 16, block_size, FP32)) for device in ("cpu", "cuda")}}


SELECTION_CASES: tuple[OpCase, ...] = (
    _case("pq_encode", "codes of all keys", encode, near(encode), tiny=_tiny(1), of=_LLAMA[:1]),
    _case("pq_table", "tables of all queries, or of one for each block", make_table, near(make_table)),
    _case(
        "pq_select",
        "an eighth of the keys for each query; the peer makes all scores, and leaves out the mask",
        select,
        same(select),
        peers={"top of the true scores": top_of_scores},
        tiny=_tiny(1),
        of=_LLAMA[:1],
    ),
    _case(
        "pq_select_blocks",
        "an eighth of the key blocks for each query block",
        select_blocks,
        same(select_blocks),
        tiny=_tiny(16),
        of=_LLAMA[1:],
    ),
    _case(
        "selected_attention",
        "attention to an eighth of the keys, single ones or blocks; the peer attends to all",
        attend,
        close(attend),
        peers={"dense attention": dense_attention},
        expected_s=60.0,
    ),
    _case(
        "selected_attention_backward",
        "its gradients; the peer is dense attention with its gradients, forward and backward",
        differentiate,
        close(differentiate, roundings=32),  # a key's gradient sums over all later queries, in another order
        peers={"dense attention, both passes": dense_step},
        expected_s=60.0,
    ),
)
