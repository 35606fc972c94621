"""What `low_rank_attention` is called with, and what a user would write instead: one token of a Llama-3.2-1B.

B = 1 sequence, h = 32 query and kv = 8 key/value heads, T = 1 query, S keys, head size D = 64, rank R of both factors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .op_case import Inputs

HEADS, KEY_VALUE_HEADS, HEAD_SIZE = 32, 8, 64
RANK = 205


def token_inputs(device: str, S: int, dtype: torch.dtype) -> Inputs:
    """query (1, h, 1, D), latents (1, S, R), factors (kv * D, R), angles (1, S, D), and keys and values in full."""
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    rows = KEY_VALUE_HEADS * HEAD_SIZE
    frequencies = 500000.0 ** (-torch.arange(0, HEAD_SIZE, 2, device=device) / HEAD_SIZE)
    angles = (torch.arange(S, device=device)[:, None] * frequencies).repeat(1, 2)[None]
    inputs: Inputs = {"query": drawn(1, HEADS, 1, HEAD_SIZE), "scale": HEAD_SIZE**-0.5}
    for name in ("key", "value"):
        inputs |= {f"{name}_latent": drawn(1, S, RANK), f"{name}_factor": drawn(rows, RANK) / RANK**0.5}
        inputs |= {f"{name}_bias": None}
    inputs |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    inputs |= {"norm_weight": None, "norm_eps": 1e-6, "mask": None, "is_causal": False}
    keys, values = rebuilt(**inputs)
    return inputs | {"keys": keys.contiguous(), "values": values.contiguous()}


def rebuilt(
    key_latent: Tensor,
    key_factor: Tensor,
    value_latent: Tensor,
    value_factor: Tensor,
    cos: Tensor,
    sin: Tensor,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """All keys, rotated, and all values: (1, kv, S, D)."""
    keys = F.linear(key_latent, key_factor).unflatten(2, (-1, HEAD_SIZE)).transpose(1, 2)
    values = F.linear(value_latent, value_factor).unflatten(2, (-1, HEAD_SIZE)).transpose(1, 2)
    low, high = keys.chunk(2, -1)
    return keys * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None], values


def rebuilt_attention(query: Tensor, scale: float, **inputs: Any) -> Tensor:
    """The full keys and values made again for the token."""
    return dense_attention(query, *rebuilt(**inputs), scale)


def dense_attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, **_: Any) -> Tensor:
    """With a cache of full keys and values."""
    return F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=True).transpose(1, 2)
