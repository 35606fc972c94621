"""Triton kernels of `sddmm`: sums entry by entry where few are wanted, else entries taken from blocks of the product.

Sparse form: chunks of tokens are turned over, so that the tokens of a column are neighbours; each program sums some
entries, tile by tile, in fp32 and in a fixed order, without atomics. Dense form: torch's product of some rows of the
matrix at a time, of which the kernel takes the entries. It needs no count of the entries in a block, so nothing waits
for the GPU. Which form is faster depends on the density K / (R * C) alone: an entry of the sparse form reads two
columns from the L2 cache, the dense form computes on tensor cores. `DENSE_FROM` are estimates from the rates of an H100
(5 TB/s; 600 TFLOP/s in half types, 50 in IEEE float32, 350 in TF32), to be measured.

float64 always takes the dense form. Shapes: a (N, R), b (N, C), indices (K,), result (K,).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .blocks import as_operand, block_rows, operand_bytes, product

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_FROM = {"half": 0.007, "ieee": 0.04, "tf32": 0.007}
CHUNK_BYTES, CHUNK_TOKENS = 32 * 2**20, 2048  # of both operands, turned over: what stays in the L2 cache
BLOCK_ENTRIES, BLOCK_TOKENS, WARPS = 32, 128, 4
BLOCK_TAKEN = 1024


@triton.jit
def sum_kernel(
    a,
    b,
    indices,
    before,
    out,
    N,
    C,
    K,
    stride_a_r,
    stride_b_c,
    stride_index,
    HAS_BEFORE: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """out[j] = before[j] + the sum over a chunk's tokens; BLOCK_ENTRIES entries for each program."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    wanted = j < K
    place = tl.load(indices + j * stride_index, mask=wanted, other=0).to(tl.int64)
    row, column = place // C, place % C
    total = tl.zeros((BLOCK_ENTRIES, BLOCK_TOKENS), tl.float32)
    for start in range(0, N, BLOCK_TOKENS):
        n = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        inside = wanted[:, None] & (n < N)[None, :]
        x = tl.load(a + row[:, None] * stride_a_r + n[None, :], mask=inside, other=0.0)
        y = tl.load(b + column[:, None] * stride_b_c + n[None, :], mask=inside, other=0.0)
        total += x.to(tl.float32) * y.to(tl.float32)
    result = tl.sum(total, 1)
    if HAS_BEFORE:
        result += tl.load(before + j, mask=wanted, other=0.0)
    tl.store(out + j, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["FIRST", "LAST"])
def take_kernel(block, indices, out, FIRST, LAST, K, stride_index, BLOCK: tl.constexpr):
    """out[j] = block[indices[j] - FIRST] for the entries in [FIRST, LAST): elements of a few rows of the product."""
    j = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(indices + j * stride_index, mask=j < K, other=-1).to(tl.int64)
    here = (place >= FIRST) & (place < LAST)
    values = tl.load(block + (place - FIRST), mask=here, other=0.0)
    tl.store(out + j, values, mask=here)


def precision(dtype: torch.dtype) -> str:
    """The key of `DENSE_FROM`: TF32 products only where the user allowed them for torch's own GEMMs."""
    if dtype.itemsize < 4:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def is_dense(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> bool:
    """Whether entries are taken from blocks of the product."""
    if a.dtype not in KERNEL_DTYPES:
        return True
    return indices.shape[0] >= DENSE_FROM[precision(a.dtype)] * a.shape[1] * b.shape[1]


def chunk_tokens(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens are turned over at once: whole tiles."""
    token_bytes = (a.shape[1] + b.shape[1]) * a.element_size()
    return max(1, min(CHUNK_TOKENS, CHUNK_BYTES // token_bytes) // BLOCK_TOKENS) * BLOCK_TOKENS


def turned(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """x (N, D) -> (D, tokens), the tokens next to each other in memory; a copy where they are not already."""
    columns = x[tokens].t()
    return columns if x.stride(0) == 1 else columns.contiguous()


def launch(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`sddmm` on a GPU: a (N, R), b (N, C), indices (K,) -> (K,) in the dtype of a."""
    if indices.shape[0] == 0 or a.shape[0] == 0:
        return a.new_zeros(indices.shape)
    with torch.cuda.device_of(a):
        return take(a, b, indices) if is_dense(a, b, indices) else summed(a, b, indices)


def summed(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The sparse form."""
    n, size = a.shape[0], chunk_tokens(a, b)
    out = a.new_empty(indices.shape)
    sums = out if n <= size or a.dtype == torch.float32 else a.new_empty(indices.shape, dtype=torch.float32)
    for start in range(0, n, size):
        tokens = slice(start, min(n, start + size))
        add_chunk(turned(a, tokens), turned(b, tokens), indices, sums, out if tokens.stop == n else sums, start > 0)
    return out


def add_chunk(
    a: torch.Tensor,
    b: torch.Tensor,
    indices: torch.Tensor,
    sums: torch.Tensor,
    out: torch.Tensor,
    has_before: bool,
) -> None:
    """out = sums + a chunk's part: a (R, tokens), b (C, tokens), whose tokens are neighbours, sums (K,) float32."""
    sum_kernel[(triton.cdiv(indices.shape[0], BLOCK_ENTRIES),)](
        a,
        b,
        indices,
        sums,
        out,
        a.shape[1],
        b.shape[0],
        indices.shape[0],
        a.stride(0),
        b.stride(0),
        *indices.stride(),
        HAS_BEFORE=has_before,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        BLOCK_TOKENS=BLOCK_TOKENS,
        num_warps=WARPS,
    )


def take(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The dense form."""
    a, b, rows, columns = as_operand(a), as_operand(b), block_rows(a, b), b.shape[1]
    out = a.new_empty(indices.shape)
    for first in range(0, a.shape[1], rows):
        last = min(first + rows, a.shape[1])
        take_kernel[(triton.cdiv(indices.shape[0], BLOCK_TAKEN),)](
            product(a[:, first:last], b),
            indices,
            out,
            first * columns,
            last * columns,
            indices.shape[0],
            *indices.stride(),
            BLOCK=BLOCK_TAKEN,
        )
    return out


def workspace_bytes(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor) -> int:
    """A block of the product, or a chunk of both operands and, for several chunks of half types, sums in float32."""
    n, entries = a.shape[0], indices.shape[0]
    if entries == 0 or n == 0:
        return 0
    if is_dense(a, b, indices):
        return operand_bytes(a) + operand_bytes(b) + block_rows(a, b) * b.shape[1] * a.element_size()
    tokens = min(n, chunk_tokens(a, b))
    copies = sum(tokens * x.shape[1] * x.element_size() for x in (a, b) if x.stride(0) != 1)
    return copies + (4 * entries if n > tokens and a.element_size() < 4 else 0)
