"""Triton kernel of `pq_encode`: a block of keys in each program, subspace by subspace.

B sequences, H heads, S keys of D features, M subspaces of d features, C codewords. The scores of a block are one small
product; codes of two subspaces are packed before they are written.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_S, BLOCK_D, WARPS = 128, 16, 4
CODEWORDS = 16  # room for them: the least size that tl.dot takes


@triton.jit
def encode_kernel(
    x,
    codebook,
    out,
    H,
    S,
    stride_x_b,
    stride_x_h,
    stride_x_s,
    stride_x_d,
    stride_h,
    stride_m,
    stride_c,
    stride_d,
    M: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    CODEWORDS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[b, h, :, s] of BLOCK_S keys s; D is the number of features of one subspace."""
    tiles = tl.cdiv(S, BLOCK_S)
    b, h = (tl.program_id(0) // tiles // H).to(tl.int64), (tl.program_id(0) // tiles % H).to(tl.int64)
    s = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    d, c = tl.arange(0, BLOCK_D).to(tl.int64), tl.arange(0, CODEWORDS).to(tl.int64)
    valid = s < S
    features = x + b * stride_x_b + h * stride_x_h + s[:, None] * stride_x_s
    codewords = codebook + h * stride_h + c[None, :] * stride_c
    for p in range((M + 1) // 2):
        packed = tl.zeros((BLOCK_S,), tl.int32)
        for half in tl.static_range(2):
            m = tl.full([], 2 * p + half, tl.int64)
            # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), and |x| is the same for all codewords.
            products = tl.zeros((BLOCK_S, CODEWORDS), tl.float32)
            norms = tl.zeros((CODEWORDS,), tl.float32)
            for start in range(0, D, BLOCK_D):
                f = start + d
                wanted = (f < D) & (f < (M - m) * D)  # none behind an odd last subspace, whose partner gets code 0
                at = features + (m * D + f)[None, :] * stride_x_d
                part = tl.load(at, mask=valid[:, None] & wanted[None, :], other=0.0)  # (BLOCK_S, BLOCK_D)
                at = codewords + m * stride_m + f[:, None] * stride_d
                of = tl.load(at, mask=wanted[:, None] & (c < C)[None, :], other=0.0)  # (BLOCK_D, CODEWORDS)
                products = tl.dot(part.to(tl.float32), of, products, input_precision="ieee")
                norms += tl.sum(of * of, 0)
            scores = tl.where((c < C)[None, :], products - norms[None, :] / 2, float("-inf"))
            packed += tl.argmax(scores, 1) << (4 * half)
        tl.store(out + ((b * H + h) * ((M + 1) // 2) + p) * S + s, packed.to(tl.uint8), mask=valid)


def launch(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """`pq_encode` on a GPU: x (B, H, S, D), codebook (H, M, C, d) -> (B, H, ceil(M / 2), S) uint8."""
    batch, heads, keys, _ = x.shape
    _, subspaces, codewords, features = codebook.shape
    out = x.new_empty((batch, heads, (subspaces + 1) // 2, keys), dtype=torch.uint8)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(x):
        encode_kernel[(batch * heads * triton.cdiv(keys, BLOCK_S),)](
            x,
            codebook,
            out,
            heads,
            keys,
            *x.stride(),
            *codebook.stride(),
            M=subspaces,
            C=codewords,
            D=features,
            CODEWORDS=CODEWORDS,
            BLOCK_S=BLOCK_S,
            BLOCK_D=BLOCK_D,
            num_warps=WARPS,
        )
    return out


def workspace_bytes(x: torch.Tensor, codebook: torch.Tensor) -> int:
    """Nothing."""
    return 0
