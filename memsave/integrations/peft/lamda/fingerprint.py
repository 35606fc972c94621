"""What an adapter remembers of the base weight it was made for, in a few integers: a hash, and a sketch of A.

A record is an int32 tensor of 8 + r numbers: version, dtype and shape (2) of the weight; two 64-bit sums over its bits;
the sketch A^T g (r,) in float32, as bits, for one fixed g (D,). Integers survive `model.half()`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

VERSION = 1
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of weights, by their number in a record
HEAD = 8
CHUNK = 1 << 20  # elements hashed at a time, 8 bytes each and more in temporaries
SKETCH_TOLERANCE = (
    1e-2  # entries of the sketch are of size 1; a vector turned by an angle moves its entry by about that
)

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))


@torch.no_grad()
def weight_hash(weight: Tensor) -> Tensor:
    """(2,) int64: weighted sums of the weight's bits, read as integers, modulo 2^64.

    The same on every device and in every order of summation. The factor of element i is odd, so that every change of
    one element shows; it finds other weights, not forgeries.
    """
    bits = weight.contiguous().view(_BITS[weight.dtype.itemsize]).flatten()
    sums = torch.zeros(2, dtype=torch.int64, device=weight.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        index = torch.arange(start, start + len(part), device=weight.device)
        first = (index * _ODD[0]) | 1
        second = ((first ^ (first >> 29)) * _ODD[1]) | 1
        sums += torch.stack([(part * first).sum(), (part * second).sum()])
    return sums


def sketch(a: Tensor) -> Tensor:
    """A^T g (r,) in float32, for g_k = sqrt(2) cos(k^2), so that no random generator is asked."""
    k = torch.arange(1, len(a) + 1, dtype=torch.float64)
    return (a.double().t() @ (2**0.5 * torch.cos(k * k))).float()


def make_record(weight: Tensor, a: Tensor) -> Tensor:
    """The record (8 + r,) int32, on the CPU, of a stored weight and of A (D, r) before it is rounded to its dtype."""
    if isinstance(weight, FakeTensor):
        return torch.zeros(HEAD + a.shape[1], dtype=torch.int32)
    head = torch.tensor([VERSION, DTYPES.index(weight.dtype), *weight.shape], dtype=torch.int32)
    return torch.cat([head, weight_hash(weight).cpu().view(torch.int32), sketch(a.cpu()).view(torch.int32)])


def why_not_same(stored: Tensor, own: Tensor, weight: Tensor | None, *, compare_sketch: bool) -> str | None:
    """Why the record `stored` in a file is not of this base weight (whose record is `own`), in words, or None.

    A weight that was widened without loss since, such as a bfloat16 model loaded in float32, counts as the same, if the
    weight itself is given.
    """
    stored, own = stored.cpu(), own.cpu()
    if stored.dtype != torch.int32 or stored.shape != own.shape:
        given = f"{stored.dtype} of shape {list(stored.shape)}"
        return f"its record is damaged: expected int32 of shape {list(own.shape)}, got {given}"
    version, code, *shape = stored[:4].tolist()
    if version != VERSION or not 0 <= code < len(DTYPES):
        return f"its record has version {version}, expected {VERSION}: damaged, or written by a newer memsave"
    if shape != own[2:4].tolist():
        return f"the base weight had shape {shape}, here it has {own[2:4].tolist()}"
    dtype, here = DTYPES[code], DTYPES[int(own[1])]
    same = torch.equal(stored[4:HEAD], own[4:HEAD])
    if dtype != here:
        narrow = None if weight is None else weight.to(dtype)
        same = narrow is not None and torch.equal(narrow.to(here), weight)  # type: ignore[arg-type]
        same = same and torch.equal(stored[4:HEAD], weight_hash(narrow).cpu().view(torch.int32))  # type: ignore[arg-type]
    if not same:
        types = "" if dtype == here else f", and was {dtype}, here it is {here}"
        return f"the base weight has other values than when the adapter was made{types}; load that base model"
    difference = (stored[HEAD:].view(torch.float32) - own[HEAD:].view(torch.float32)).abs()
    if compare_sketch and not bool((difference <= SKETCH_TOLERANCE).all()):
        return (
            "the singular vectors come out differently on this machine (another BLAS or torch); save the adapter with "
            "save_factors=True where it was trained"
        )
    return None
