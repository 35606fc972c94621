"""Ascending positions in about 2 + log2(M / K) bits each: the code that masks are stored in.

K positions below M, strictly ascending. The lower l = floor(log2(M / K)) bits of each are packed one after the other;
the upper parts h_i are a string of bits in which bit h_i + i is set. At a density of 1% a position takes 8.6 bits.
The length follows from K and M alone, so that the shape of a stored mask is known before it is read.

Source: Elias, "Efficient Storage and Retrieval by Content and Address of Static Files", J. ACM 1974; Fano 1971.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import ops


def num_bytes(k: int, numel: int) -> int:
    """Bytes of the code of k positions below numel."""
    low = _low_bits(k, numel)
    return _bytes(k * low) + _bytes(_high_length(k, numel, low))


def encode(indices: Tensor, numel: int) -> Tensor:
    """The code, (num_bytes,) uint8 on the CPU, of indices (K,), strictly ascending integers in [0, numel)."""
    positions = indices.to("cpu", torch.int64)
    k = positions.shape[0]
    low = _low_bits(k, numel)
    lower = (positions[:, None] >> _arange(low)) & 1  # (K, l)
    upper = torch.zeros(_high_length(k, numel, low), dtype=torch.bool, device="cpu")
    upper[(positions >> low) + _arange(k)] = True
    return torch.cat((_packed(lower.flatten().bool()), _packed(upper)))


def decode(code: Tensor, k: int, numel: int) -> Tensor:
    """The positions (K,) int32 of a code (num_bytes,) uint8, on the CPU.

    Raises:
        ValueError: it is not the code of k ascending positions below numel.
    """
    low = _low_bits(k, numel)
    if code.dtype != torch.uint8 or tuple(code.shape) != (num_bytes(k, numel),):
        raise ValueError(
            f"expected the mask of {k} of {numel} entries as {num_bytes(k, numel)} bytes, got {code.dtype} of shape "
            f"{tuple(code.shape)}"
        )
    bits = (code.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu")) & 1  # (bytes, 8)
    split = _bytes(k * low)
    lower_bits, upper_bits = bits[:split].flatten(), bits[split:].flatten()
    length = _high_length(k, numel, low)
    upper = upper_bits[:length].nonzero().squeeze(1)
    if upper.shape[0] != k or bool(lower_bits[k * low :].any()) or bool(upper_bits[length:].any()):
        raise ValueError(f"the mask does not hold {k} positions ({upper.shape[0]} found, or stray bits at its end)")
    lower = (lower_bits[: k * low].view(k, low).long() << _arange(low)).sum(1)
    positions = (upper - _arange(k) << low) + lower
    if k and (bool((positions[1:] <= positions[:-1]).any()) or int(positions[-1]) >= numel):
        raise ValueError(f"the mask's positions are not ascending, or not below {numel}")
    return positions.to(torch.int32)


def _low_bits(k: int, numel: int) -> int:
    return max(0, (numel // max(k, 1)).bit_length() - 1)


def _high_length(k: int, numel: int, low: int) -> int:
    return k + (max(numel - 1, 0) >> low) + 1


def _bytes(bits: int) -> int:
    return (bits + 7) // 8


def _arange(n: int) -> Tensor:
    return torch.arange(n, device="cpu")  # also where another device is the default


def _packed(bits: Tensor) -> Tensor:
    return ops.pack_bits(bits[None, :])[0]
