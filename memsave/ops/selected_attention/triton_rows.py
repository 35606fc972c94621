"""What the Triton kernels of `selected_attention` and its backward share: the keys of a query block, and what it sees.

g query heads for each key/value head; query and key blocks of SIZE.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

MAX_FEATURES = {torch.float16: 256, torch.bfloat16: 256, torch.float32: 128}
WARP_THREADS = 64 if torch.version.hip else 32
LOG2_E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(float("-inf"))


@triton.jit
def number_of_chosen(indices, K, stride, BLOCK: tl.constexpr):
    """How many of K indices are not -1."""
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        i = start + tl.arange(0, BLOCK).to(tl.int64)
        count += (tl.load(indices + i * stride, mask=i < K, other=-1) >= 0).to(tl.int32)
    return tl.sum(count)


@triton.jit
def chosen_keys(indices, place, count, S, stride, SIZE: tl.constexpr):
    """The keys in places of the count * SIZE that a query block has, and whether there is one."""
    number = tl.load(indices + (place // SIZE).to(tl.int64) * stride, mask=place < count * SIZE, other=-1)
    s = number * SIZE + place % SIZE
    return s, (number >= 0) & (s < S)


@triton.jit
def visible(
    sees,
    own,
    s,
    mask,
    of_row,
    window,
    stride_mask_s,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """`sees` without what is hidden from queries beside keys `own`; of_row: where the mask of a row begins."""
    if IS_CAUSAL:
        sees = sees & (s <= own)
    if HAS_WINDOW:
        sees = sees & (s > own - window)
    if mask is not None:
        sees = sees & (tl.load(mask + of_row + s.to(tl.int64) * stride_mask_s, mask=sees, other=0) != 0)
    return sees


@triton.jit
def products(
    x,
    y,
    valid_x,
    valid_y,
    D,
    stride_x,
    stride_y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_M, D) times (BLOCK_N, D)^T by pointers to their rows, BLOCK_K features at a time."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K).to(tl.int64)
        inside = (d < D)[None, :]
        of_x = tl.load(x[:, None] + d[None, :] * stride_x, mask=valid_x[:, None] & inside, other=0.0)
        of_y = tl.load(y[:, None] + d[None, :] * stride_y, mask=valid_y[:, None] & inside, other=0.0)
        total = tl.dot(of_x, tl.trans(of_y), total, input_precision=PRECISION)
    return total


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """float64 and wide heads have none."""
    return max(query.shape[3], value.shape[3]) <= MAX_FEATURES.get(query.dtype, -1)


def power_of_2(n: int) -> int:
    """The smallest that is at least n and 16, the least size that tensor cores take."""
    return max(16, 1 << (n - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """TF32 products only where the user allowed them for torch's own GEMMs."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def step_of(dtype: torch.dtype) -> int:
    """BLOCK_K: how many features are multiplied at once; 0 for all. More float32 numbers do not fit into registers."""
    return 32 if dtype.itemsize == 4 else 0
