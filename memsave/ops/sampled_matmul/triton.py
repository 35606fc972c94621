"""Triton kernel of `sampled_matmul`: a GEMM that reads the sampled rows of dy in place, without a gathered copy.

Rows are scaled in fp32 and rounded to the dtype of dy before the product, as the reference does, and accumulated in
fp32. Where O x D has too few tiles to fill a GPU (a LoRA factor), the k rows are split into slices whose partial sums
are added in a fixed order, without atomics. The tile, and with it the order of the sum inside a slice, is tuned by
timing; under `torch.use_deterministic_algorithms` it is always the first.

float64 has no kernel: `KERNEL_DTYPES` names what has, and other dtypes take the plain torch expression in `launch`.

Shapes: dy (N, O), kept (k, D), rows (k,), scale (k,), result (O, D) = sum_r scale[r] * outer(dy[rows[r]], kept[r]).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _config(block_o: int, block_d: int, block_k: int, warps: int, stages: int) -> triton.Config:
    blocks = {"BLOCK_O": block_o, "BLOCK_D": block_d, "BLOCK_K": block_k}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


# By bytes per element. A row number is loaded before its row of dy, so the stages hold two loads in turn.
CONFIGS = {
    2: [_config(64, 64, 64, 4, 4), _config(16, 128, 64, 4, 4), _config(128, 128, 32, 8, 4)],
    4: [_config(64, 64, 32, 4, 4), _config(16, 128, 32, 4, 4), _config(128, 128, 16, 8, 4)],
}
SLICE_TILE = 64
SLICE_PROGRAMS = 256
SLICE_MIN_ROWS = 512


@triton.jit(do_not_specialize=["shape_class"])
def matmul_kernel(
    dy,
    kept,
    rows,
    scale,
    out,
    K,
    OUT,
    IN,
    stride_dy_n,
    stride_dy_o,
    stride_kept_k,
    stride_kept_d,
    stride_rows,
    stride_scale,
    slice_rows,
    shape_class,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[z, o, d] = the sum over the rows of slice z; one BLOCK_O x BLOCK_D tile of one slice for each program."""
    o = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.program_id(2).to(tl.int64) * slice_rows
    last = tl.minimum(first + slice_rows, K)
    total = tl.zeros((BLOCK_O, BLOCK_D), tl.float32)
    for begin in range(first, last, BLOCK_K):
        r = begin + tl.arange(0, BLOCK_K)
        valid = r < last
        row = tl.load(rows + r * stride_rows, mask=valid, other=0).to(tl.int64)
        factor = tl.load(scale + r * stride_scale, mask=valid, other=0.0)
        gradient = tl.load(
            dy + row[None, :] * stride_dy_n + o[:, None] * stride_dy_o,
            mask=valid[None, :] & (o < OUT)[:, None],
            other=0.0,
        )  # (BLOCK_O, BLOCK_K)
        values = tl.load(
            kept + r[:, None] * stride_kept_k + d[None, :] * stride_kept_d,
            mask=valid[:, None] & (d < IN)[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_D)
        scaled = (gradient.to(tl.float32) * factor[None, :]).to(values.dtype)
        total = tl.dot(scaled, values, total, input_precision=PRECISION)
    inside = (o < OUT)[:, None] & (d < IN)[None, :]
    place = (tl.program_id(2).to(tl.int64) * OUT + o[:, None]) * IN + d[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def slices(k: int, out_features: int, in_features: int) -> int:
    """Into how many slices the kept rows are split: enough programs to fill a GPU, and enough rows for each."""
    tiles = triton.cdiv(out_features, SLICE_TILE) * triton.cdiv(in_features, SLICE_TILE)
    return max(1, min(SLICE_PROGRAMS // tiles, k // SLICE_MIN_ROWS))


def shape_class(k: int, out_features: int, in_features: int) -> int:
    """One number for all shapes with the same powers of two: autotuning runs once for each."""
    return k.bit_length() * 10000 + out_features.bit_length() * 100 + in_features.bit_length()


def precision(dtype: torch.dtype) -> str:
    """TF32 products only where the user allowed them for torch's own GEMMs."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def scaled_rows(dy: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gathered copy (k, O) that dtypes without a kernel need."""
    return dy.index_select(0, rows) * scale[:, None]


_TUNED = {
    size: triton.autotune(configs=configs, key=["shape_class", "PRECISION"])(matmul_kernel)
    for size, configs in CONFIGS.items()
}


def launch(dy: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`sampled_matmul` on a GPU: dy (N, O), kept (k, D), rows (k,), scale (k,) -> (O, D) in the dtype of dy."""
    if dy.dtype not in KERNEL_DTYPES:
        return scaled_rows(dy, rows, scale).t() @ kept
    k, out_features, in_features = rows.shape[0], dy.shape[1], kept.shape[1]
    if 0 in (k, out_features, in_features):
        return dy.new_zeros((out_features, in_features))
    parts = slices(k, out_features, in_features)
    if parts == 1:
        out = dy.new_empty((out_features, in_features))
    else:
        out = dy.new_empty((parts, out_features, in_features), dtype=torch.float32)

    def grid(config: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(out_features, config["BLOCK_O"]), triton.cdiv(in_features, config["BLOCK_D"]), parts

    # The interpreter cannot time configs.
    fixed = triton.knobs.runtime.interpret or torch.are_deterministic_algorithms_enabled()
    size = dy.element_size()
    kernel, options = (matmul_kernel, CONFIGS[size][0].all_kwargs()) if fixed else (_TUNED[size], {})
    with torch.cuda.device_of(dy):
        kernel[grid](
            dy,
            kept,
            rows,
            scale,
            out,
            k,
            out_features,
            in_features,
            *dy.stride(),
            *kept.stride(),
            *rows.stride(),
            *scale.stride(),
            triton.cdiv(k, parts),
            shape_class(k, out_features, in_features),
            PRECISION=precision(dy.dtype),
            **options,
        )
    return out if parts == 1 else out.sum(0).to(dy.dtype)


def workspace_bytes(dy: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> int:
    """The partial sums of the slices, and their total where it is rounded; without a kernel, the copies of the rows."""
    k, out_features, in_features = rows.shape[0], dy.shape[1], kept.shape[1]
    if dy.dtype not in KERNEL_DTYPES:
        return 2 * k * out_features * dy.element_size()
    parts = slices(k, out_features, in_features) if k * out_features * in_features else 1
    partial_sums = 0 if parts == 1 else parts + (dy.dtype != torch.float32)
    return partial_sums * out_features * in_features * 4
