"""Triton kernel of `low_rank_mlp`: one program computes some rows of the result, and h tile by tile, on the chip.

A program holds the sums of its rows over all of R, in fp32, so that no tile of h is computed twice; with R that is
BLOCK_RANK columns, a power of two. The more of them, the fewer rows it takes. act(gate) and h are rounded to the dtype
of p_gate, as plain PyTorch does.

float64 and an R above `MAX_RANK` have no kernel: as in the reference, torch's products make h of some rows at a time.
The limit is where registers spill on some GPU of `tests/triton/resources.py`.

Shapes: p_gate (N, R1), expand_gate (F, R1), p_up (N, R2), expand_up (F, R2), biases (F,), reduce_down (R, F), result
(N, R) = (act(p_gate expand_gate^T + bias_gate) * (p_up expand_up^T + bias_up)) reduce_down^T.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from ..gated_activation import triton as gated_activation
from ..triton_activations import value_and_slope
from . import chunks


def _config(block_n: int, block_f: int, block_r: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_N": block_n, "BLOCK_F": block_f, "BLOCK_R": block_r}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


@triton.jit
def before_activation(
    p,
    expand,
    bias,
    n,
    f,
    F,
    R,
    stride_p_n,
    stride_p_r,
    stride_expand_f,
    stride_expand_r,
    stride_bias,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """p @ expand^T + bias of the rows n and the hidden units f, (BLOCK_N, BLOCK_F) in fp32; zero behind F."""
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for begin in range(0, R, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R).to(tl.int64)
        rows = tl.load(
            p + n[:, None] * stride_p_n + r[None, :] * stride_p_r,
            mask=(r < R)[None, :],
            other=0.0,
        )  # (BLOCK_N, BLOCK_R)
        factor = tl.load(
            expand + r[:, None] * stride_expand_r + f[None, :] * stride_expand_f,
            mask=(r < R)[:, None] & (f < F)[None, :],
            other=0.0,
        )  # (BLOCK_R, BLOCK_F)
        total = tl.dot(rows, factor, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + f * stride_bias, mask=f < F, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["shape_class"])
def mlp_kernel(
    p_gate,
    expand_gate,
    bias_gate,
    p_up,
    expand_up,
    bias_up,
    reduce_down,
    out,
    N,
    F,
    R1,
    R2,
    R,
    stride_p_gate_n,
    stride_p_gate_r,
    stride_expand_gate_f,
    stride_expand_gate_r,
    stride_bias_gate,
    stride_p_up_n,
    stride_p_up_r,
    stride_expand_up_f,
    stride_expand_up_r,
    stride_bias_up,
    stride_down_r,
    stride_down_f,
    shape_class,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """BLOCK_N rows of out for each program."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)  # behind N the last row is computed again, and not stored: masks take registers
    column = tl.arange(0, BLOCK_RANK).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_RANK), tl.float32)
    for begin in range(0, F, BLOCK_F):
        f = begin + tl.arange(0, BLOCK_F).to(tl.int64)
        gate = before_activation(
            p_gate,
            expand_gate,
            bias_gate,
            row,
            f,
            F,
            R1,
            stride_p_gate_n,
            stride_p_gate_r,
            stride_expand_gate_f,
            stride_expand_gate_r,
            stride_bias_gate,
            PRECISION,
            BLOCK_N,
            BLOCK_F,
            BLOCK_R,
        )
        activated, _ = value_and_slope(gate, KIND)
        h = activated.to(out.dtype.element_ty)
        if p_up is not None:
            up = before_activation(
                p_up,
                expand_up,
                bias_up,
                row,
                f,
                F,
                R2,
                stride_p_up_n,
                stride_p_up_r,
                stride_expand_up_f,
                stride_expand_up_r,
                stride_bias_up,
                PRECISION,
                BLOCK_N,
                BLOCK_F,
                BLOCK_R,
            )
            h = (h.to(tl.float32) * up).to(out.dtype.element_ty)
        down = tl.load(
            reduce_down + f[:, None] * stride_down_f + column[None, :] * stride_down_r,
            mask=(f < F)[:, None] & (column < R)[None, :],
            other=0.0,
        )  # (BLOCK_F, BLOCK_RANK)
        total = tl.dot(h, down, total, input_precision=PRECISION)
    inside = (n < N)[:, None] & (column < R)[None, :]
    tl.store(out + n[:, None] * R + column[None, :], total.to(out.dtype.element_ty), mask=inside)


# By bytes per element and the most columns that a program holds. More rows for each program read the factors less
# often; fewer make more programs. The first of each list also has registers enough for ranks that are no multiple of
# 16, whose masks take some; the others are tuned by timing.
CONFIGS = {
    2: {
        128: [_config(64, 64, 32, 8, 3), _config(64, 64, 64, 8, 2)],
        256: [_config(64, 64, 32, 8, 3), _config(32, 32, 64, 8, 2)],
        512: [_config(32, 32, 32, 8, 2), _config(64, 16, 64, 8, 2)],
        1024: [_config(32, 16, 64, 8, 2), _config(16, 32, 64, 8, 2)],
    },
    4: {
        128: [_config(16, 32, 16, 4, 2)],
        256: [_config(16, 32, 32, 4, 2), _config(32, 32, 32, 8, 2)],
        512: [_config(16, 32, 32, 8, 2), _config(32, 16, 32, 8, 2)],
    },
}
MAX_RANK = {size: max(lists) for size, lists in CONFIGS.items()}
MIN_BLOCK = 16


def has_kernel(p_gate: torch.Tensor, reduce_down: torch.Tensor) -> bool:
    """Whether the kernel serves this dtype and R."""
    return reduce_down.shape[0] <= MAX_RANK.get(p_gate.element_size(), 0)


def activation(x: torch.Tensor, kind: int) -> torch.Tensor:
    """act(x), by the kernel of the product in a gated block: times one."""
    return gated_activation.launch(x, x.new_ones((1, 1)).expand(x.shape), kind)


def block_rank(rank: int) -> int:
    """How many columns a program holds for R = `rank`."""
    return max(MIN_BLOCK, triton.next_power_of_2(rank))


def columns_class(size: int, rank: int) -> int:
    """The key of `CONFIGS[size]` that serves R = `rank`."""
    return next(columns for columns in CONFIGS[size] if rank <= columns)


def shape_class(n: int, features: int, inner: int) -> int:
    """One number for all shapes with the same powers of two: autotuning runs once for each. `inner`: of R1 and R2."""
    return n.bit_length() * 10000 + features.bit_length() * 100 + inner.bit_length()


def precision(dtype: torch.dtype) -> str:
    """TF32 products only where the user allowed them for torch's own GEMMs."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def strides(tensor: torch.Tensor | None, ndim: int) -> tuple[int, ...]:
    return (0,) * ndim if tensor is None else tensor.stride()


_TUNED = {
    (size, columns): triton.autotune(configs=configs, key=["shape_class", "BLOCK_RANK", "PRECISION"])(mlp_kernel)
    for size, lists in CONFIGS.items()
    for columns, configs in lists.items()
}


def launch(
    p_gate: torch.Tensor,
    expand_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    p_up: torch.Tensor | None,
    expand_up: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    reduce_down: torch.Tensor,
    kind: int,
) -> torch.Tensor:
    """`low_rank_mlp` on a GPU: p_gate (N, R1), ..., reduce_down (R, F) -> (N, R) in the dtype of p_gate."""
    tensors = p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down
    if not has_kernel(p_gate, reduce_down):
        return chunks.in_chunks(*tensors, partial(activation, kind=kind))
    (n, inner), (rank, features) = p_gate.shape, reduce_down.shape
    inner_up = 0 if p_up is None else p_up.shape[1]
    out = p_gate.new_empty((n, rank))
    if out.numel() == 0:
        return out
    # The interpreter cannot time configs.
    fixed = triton.knobs.runtime.interpret or torch.are_deterministic_algorithms_enabled()
    size = p_gate.element_size()
    lists = size, columns_class(size, rank)
    kernel, options = (mlp_kernel, CONFIGS[lists[0]][lists[1]][0].all_kwargs()) if fixed else (_TUNED[lists], {})
    with torch.cuda.device_of(p_gate):
        kernel[lambda config: (triton.cdiv(n, config["BLOCK_N"]),)](
            *tensors,
            out,
            n,
            features,
            inner,
            inner_up,
            rank,
            *(
                stride
                for tensor, ndim in zip(tensors, (2, 2, 1, 2, 2, 1, 2), strict=True)
                for stride in strides(tensor, ndim)
            ),
            shape_class(n, features, max(inner, inner_up)),
            KIND=kind,
            PRECISION=precision(p_gate.dtype),
            BLOCK_RANK=block_rank(rank),
            **options,
        )
    return out


def workspace_bytes(
    p_gate: torch.Tensor,
    expand_gate: torch.Tensor,
    bias_gate: torch.Tensor | None,
    p_up: torch.Tensor | None,
    expand_up: torch.Tensor | None,
    bias_up: torch.Tensor | None,
    reduce_down: torch.Tensor,
    kind: int,
) -> int:
    """Nothing; without a kernel, what plain PyTorch takes."""
    if has_kernel(p_gate, reduce_down):
        return 0
    inside = torch.Tensor.element_size  # of the one that `activation` multiplies with
    return chunks.workspace_bytes(p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down, inside)
