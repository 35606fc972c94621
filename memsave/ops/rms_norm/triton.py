"""Triton kernel of `rms_norm`: one row for each program, read once.

Shapes: x (N, D), weight (D,) or None, results y (N, D) and rstd (N,). Statistics are float32. float64, and rows longer
than a program holds, take plain PyTorch.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import reference
from .style import Style, output_dtype, rounded_dtype

MAX_FEATURES = 16384
ONE_PLUS = tl.constexpr(int(Style.ONE_PLUS))
TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def forward_kernel(
    x,
    weight,
    y,
    rstd,
    D,
    eps,
    stride_n,
    stride_d,
    stride_w,
    STYLE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = weight * xhat of one row; ROUNDED is what xhat is rounded to before it is scaled."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    wide = tl.load(x + r * stride_n + d.to(tl.int64) * stride_d, mask=inside, other=0.0).to(tl.float32)  # (BLOCK,)
    root = 1.0 / tl.sqrt(tl.sum(wide * wide) / D + eps)
    tl.store(rstd + r, root)
    values = (wide * root).to(ROUNDED).to(tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + d * stride_w, mask=inside, other=0.0).to(tl.float32)
        values = (scale + 1.0 if STYLE == ONE_PLUS else scale) * values
    tl.store(y + r * D + d, values.to(y.dtype.element_ty), mask=inside)


def served(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the kernels take these tensors."""
    return x.shape[1] <= MAX_FEATURES and all(t is None or t.dtype in TRITON_DTYPES for t in (x, *others))


def tile(features: int, warp_threads: int = 64 if torch.version.hip else 32) -> tuple[int, int]:
    """(BLOCK, number of warps) for rows of `features` elements: 16 elements for each of at most 1,024 threads."""
    block = max(triton.next_power_of_2(features), 16)
    return block, min(max(block // 16, warp_threads), 1024) // warp_threads


def launch(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: int, double: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` on a GPU: x (N, D), weight (D,) or None -> y (N, D), rstd (N,)."""
    if not served(x, weight):
        return reference.rms_norm(x, weight, eps, style, double)
    n, features = x.shape
    weight_dtype = None if weight is None else weight.dtype
    y = torch.empty(x.shape, dtype=output_dtype(x.dtype, weight_dtype, style, double), device=x.device)
    if features == 0:
        return y, torch.full((n,), float("nan"), device=x.device)  # the mean of nothing
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0:
        return y, rstd
    block, warps = tile(features)
    rounded = rounded_dtype(x.dtype, weight_dtype, style) or torch.float32
    with torch.cuda.device_of(x):
        forward_kernel[(n,)](
            x,
            weight,
            y,
            rstd,
            features,
            eps,
            *x.stride(),
            0 if weight is None else weight.stride(0),
            STYLE=style,
            HAS_WEIGHT=weight is not None,
            ROUNDED=TRITON_DTYPES[rounded],
            BLOCK=block,
            num_warps=warps,
        )
    return y, rstd


def workspace_bytes(x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: int, double: bool) -> int:
    return 0 if served(x, weight) else reference.workspace_bytes(x, weight, eps, style, double)
