"""Tests of the tests: every Triton kernel with one mistake, which some row of the case table must notice."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases.ops import SPECS, one_dtype
from tests.harness import OpCase, has_kernel

from .kernels import KERNEL_CASES, interpret

# op, what is right, what is wrong. Those that reach outside of their tensors stay within the guards of the harness.
MUTANTS = [
    ("gated_activation", "inside = f < F", "inside = f < F - 1"),
    ("gated_activation", "element_ty), mask=inside", "element_ty)"),
    ("gated_activation", "n * stride_gate_n", "n * F"),
    ("gated_activation", "f * stride_up_f", "f"),
    ("gated_activation", "y.to(h.dtype.element_ty)", "y.to(tl.float16)"),
    ("gated_activation", "rounded * factor", "rounded"),
    ("gated_activation_backward", "inside = f < F", "inside = f < F - 1"),
    ("gated_activation_backward", "dx.to(dgate.dtype.element_ty), mask=inside", "dx.to(dgate.dtype.element_ty)"),
    ("gated_activation_backward", "(upstream * y).to(dup.dtype.element_ty), mask=inside", "upstream * y"),
    ("gated_activation_backward", "n * stride_dh_n", "n * F"),
    ("gated_activation_backward", "f * stride_gate_f", "f"),
    ("gated_activation_backward", "upstream * factor * slope", "upstream * slope"),
    ("gated_activation_backward", "upstream * y", "y"),
    ("gather_rows", "r < K)[:, None]", "r < K - 1)[:, None]"),
    ("gather_rows", "(d < D)[None, :]", "(d < D - 1)[None, :]"),
    ("gather_rows", "values.to(out.dtype.element_ty), mask=inside", "values.to(out.dtype.element_ty)"),
    ("gather_rows", "else values) * factor", "else values) + 0 * factor"),
    ("gather_rows", "row[:, None] * stride_n", "(row[:, None].to(tl.float32) * stride_n).to(tl.int64)"),
    ("sampled_matmul", "valid = r < last", "valid = r < last - 1"),
    ("sampled_matmul", "valid = r < last", "valid = r < last + 1"),
    ("sampled_matmul", "* factor[None, :]", "+ 0 * factor[None, :]"),
    ("sampled_matmul", "row[None, :] * stride_dy_n", "(row[None, :].to(tl.float32) * stride_dy_n).to(tl.int64)"),
    ("sampled_matmul", "program_id(2).to(tl.int64) * OUT", "program_id(2).to(tl.int64) * 0"),
    (
        "sampled_matmul",
        "total, input_precision=PRECISION)",
        "total).to(tl.float16).to(tl.float32)",
    ),
    ("sddmm", "wanted = j < K", "wanted = j < K - 1"),
    ("sddmm", "element_ty), mask=wanted", "element_ty)"),
    ("sddmm", "(n < N)[None, :]", "(n < N - 1)[None, :]"),
    ("sddmm", "(n < N)[None, :]", "(n < N + 1)[None, :]"),
    ("sddmm", "total += x", "total = x"),
    ("sddmm", "column[:, None] * stride_b_c", "row[:, None] * stride_b_c"),
    ("sddmm", "row[:, None] * stride_a_r", "row[:, None] * N"),
    ("sddmm", "result += tl.load(before", "result += 0 * tl.load(before"),
    ("sddmm", "HAS_BEFORE=has_before", "HAS_BEFORE=False"),
    ("sddmm", "x.to(tl.float32) * y.to(tl.float32)", "(x * y).to(tl.float32)"),
    ("sddmm", "mask=j < K, other=-1", "mask=j < K - 1, other=-1"),
    ("sddmm", "(place < LAST)", "(place < LAST - 1)"),
    ("sddmm", "(place >= FIRST)", "(place > FIRST)"),
    ("sddmm", "values, mask=here", "values, mask=j < K"),
    ("sddmm", "block + (place - FIRST)", "block + place % 128"),
    ("row_inclusion", "left * m >= rest", "left * m >= 2 * rest"),
    ("row_inclusion", "tl.full([], SHRINK, tl.float64)", "1.0"),
    ("row_inclusion", "other=0) + m", "other=0)"),
    ("row_inclusion", "remainder - room_before", "remainder - room_before - 1"),
    ("row_inclusion", "added - here + ONE, mask=i < N", "added - here + ONE"),
    ("draw_rows", "position - start - 1", "position - start"),
    ("draw_rows", "hits + before", "hits + 0 * before"),
    ("draw_rows", "0x7FFFFFFF", "0x3FFFFFFF"),
    ("draw_rows", "key, mask=i < N", "key"),
    ("rms_norm", "inside = d < D", "inside = d < D - 1"),
    ("rms_norm", "element_ty), mask=inside", "element_ty)"),
    ("rms_norm", "tl.full([], EPS, WIDE)", "0.0"),
    ("rms_norm", "/ D + ", "/ BLOCK + "),
    ("rms_norm", "r * stride_n", "r * D"),
    ("rms_norm", ".to(ROUNDED)", ".to(tl.float16)"),
    ("rms_norm", "scale.to(WIDE) + 1.0 if", "scale if"),
    ("rms_norm_backward", "inside = d < D", "inside = d < D - 1"),
    ("rms_norm_backward", "group * rows + rows, N)", "group * rows + rows, N - 1)"),
    ("rms_norm_backward", "group * rows + rows, N)", "group * rows + 1, N)"),
    ("rms_norm_backward", "total += dxhat", "total = dxhat"),
    ("rms_norm_backward", "scale + 1.0 if", "scale if"),
    ("rms_norm_backward", "r * stride_dy_n", "r * D"),
    ("rms_norm_backward", "total, mask=inside", "total"),
    ("rms_norm_backward", "- xhat * mean", "- mean"),
    ("layer_norm", "inside = d < D", "inside = d < D - 1"),
    ("layer_norm", "element_ty), mask=inside", "element_ty)"),
    ("layer_norm", "tl.where(inside, wide - tl.sum(wide) / D, 0.0)", "wide - tl.sum(wide) / D"),
    ("layer_norm", "tl.full([], EPS, WIDE)", "0.0"),
    ("layer_norm", "tl.sum(values * values) / D", "tl.sum(values * values) / BLOCK"),
    ("layer_norm", "r * stride_n", "r * D"),
    ("layer_norm", "d * stride_b", "d"),
    ("layer_norm_backward", "inside = d < D", "inside = d < D - 1"),
    ("layer_norm_backward", "group * rows + rows, N)", "group * rows + rows, N - 1)"),
    ("layer_norm_backward", "products += dxhat", "products = dxhat"),
    ("layer_norm_backward", "dys += dxhat", "dys = dxhat"),
    ("layer_norm_backward", "wide - tl.sum(wide) / D", "wide"),
    ("layer_norm_backward", "wide_d * stride_dy_d, mask=inside, other=0.0", "wide_d * stride_dy_d"),
    ("layer_norm_backward", "dxhat - tl.sum(dxhat) / D", "dxhat"),
    ("layer_norm_backward", "group * 2 * D + D + d", "group * 2 * D + d"),
    ("layer_norm_backward", "r * stride_dy_n", "r * D"),
    ("pack_bits", "& (d < D)", ""),
    ("pack_bits", "packed.to(tl.uint8), mask=i < NUM_BYTES", "packed.to(tl.uint8)"),
    ("pack_bits", "<< place[None, :]", "<< (7 - place[None, :])"),
    ("pack_bits", "row[:, None] * stride_n", "row[:, None] * D"),
    ("masked_scale", "inside = i < NUMEL", "inside = i < NUMEL - 1"),
    ("masked_scale", "element_ty), mask=inside", "element_ty)"),
    ("masked_scale", "row * stride_x_n", "row * D"),
    ("masked_scale", "row * stride_bits_n", "row * (D // 8)"),
    ("masked_scale", "tl.full([], SCALE, WIDE)", "tl.full([], SCALE, tl.float32)"),
    ("masked_scale", "values * factor", "tl.where(is_set == 1, values * factor, 0.0)"),
    ("low_rank_mlp", "mask=(r < R)[None, :]", "mask=(r < R - 1)[None, :]"),
    ("low_rank_mlp", "mask=(r < R)[None, :]", "mask=(r < R + 1)[None, :]"),
    ("low_rank_mlp", "mask=(r < R)[:, None] & (f < F)[None, :]", "mask=(r < R)[:, None] & (f < F - 1)[None, :]"),
    ("low_rank_mlp", "mask=(r < R)[:, None] & (f < F)[None, :]", "mask=(r < R + 1)[:, None] & (f < F)[None, :]"),
    ("low_rank_mlp", "row = tl.minimum(n, N - 1)", "row = tl.minimum(n, N - 2)"),
    ("low_rank_mlp", "f * stride_bias, mask=f < F, other=0.0", "f, mask=f < F, other=0.0"),
    ("low_rank_mlp", "f * stride_bias, mask=f < F, other=0.0", "f * stride_bias"),
    ("low_rank_mlp", "total += tl.load(bias", "total += 0 * tl.load(bias"),
    ("low_rank_mlp", "n[:, None] * stride_p_n + r[None, :] * stride_p_r", "n[:, None] * R + r[None, :] * stride_p_r"),
    ("low_rank_mlp", "r[None, :] * stride_p_r", "r[None, :]"),
    ("low_rank_mlp", "f[None, :] * stride_expand_f", "f[None, :] * R"),
    ("low_rank_mlp", "r[:, None] * stride_expand_r", "r[:, None]"),
    ("low_rank_mlp", "factor, total, input_precision=PRECISION)", "factor, input_precision=PRECISION)"),
    ("low_rank_mlp", "h = activated.to(out.dtype.element_ty)", "h = gate.to(out.dtype.element_ty)"),
    ("low_rank_mlp", "h.to(tl.float32) * up", "h.to(tl.float32)"),
    ("low_rank_mlp", "activated.to(out.dtype.element_ty)", "activated.to(tl.float16).to(out.dtype.element_ty)"),
    ("low_rank_mlp", "R2,\n                stride_p_up_n", "R1,\n                stride_p_up_n"),
    ("low_rank_mlp", "f[:, None] * stride_down_f", "f[:, None]"),
    ("low_rank_mlp", "column[None, :] * stride_down_r", "column[None, :] * F"),
    ("low_rank_mlp", "mask=(f < F)[:, None]", "mask=(f < F + 1)[:, None]"),
    ("low_rank_mlp", "mask=(f < F)[:, None] & (column < R)", "mask=(f < F)[:, None] & (column < R - 1)"),
    ("low_rank_mlp", "total = tl.dot(h, down, total,", "total = tl.dot(h, down,"),
    (
        "low_rank_mlp",
        "total = tl.dot(h, down, total, input_precision=PRECISION)",
        "total = tl.dot(h, down, total).to(tl.float16).to(tl.float32)",
    ),
    ("low_rank_mlp", "inside = (n < N)[:, None] & (column < R)", "inside = (n < N - 1)[:, None] & (column < R)"),
    ("low_rank_mlp", "total.to(out.dtype.element_ty), mask=inside", "total.to(out.dtype.element_ty)"),
    ("low_rank_mlp", "out + n[:, None] * R", "out + n[:, None] * BLOCK_RANK"),
    ("low_rank_attention", "inside = r < T * G\n    t, head", "inside = r < T * G - 1\n    t, head"),
    ("low_rank_attention", "in_low, in_high = low < half, high < D", "in_low, in_high = low < half - 1, high < D"),
    ("low_rank_attention", "in_low, in_high = low < half, high < D", "in_low, in_high = low < half, high < D - 1"),
    ("low_rank_attention", "in_low, in_high = low < half, high < D", "in_low, in_high = low < half + 1, high < D"),
    ("low_rank_attention", "t, head = r // G, g * G + r % G", "t, head = r // G, g * G + 0 * r"),
    ("low_rank_attention", "rows[:, None] + low[None, :] * stride_query_d", "rows[:, None] + low[None, :]"),
    ("low_rank_attention", "head * stride_query_h", "head * T * D"),
    ("low_rank_attention", "(g * D + high) * stride_key_factor_d", "(g * D + low) * stride_key_factor_d"),
    ("low_rank_attention", "last = tl.minimum(first + slice_keys, S)", "last = first + slice_keys"),
    ("low_rank_attention", "last = tl.minimum(first + slice_keys, S)", "last = tl.minimum(first + slice_keys, S - 1)"),
    ("low_rank_attention", "bottom // G + S - T + 1)", "bottom // G + S - T)"),
    ("low_rank_attention", "(n[None, :] <= t[:, None] + (S - T))", "(n[None, :] < t[:, None] + (S - T))"),
    ("low_rank_attention", "(n[None, :] <= t[:, None] + (S - T))", "(n[None, :] <= t[:, None])"),
    ("low_rank_attention", "valid = n < last", "valid = n < last + 1"),
    # The published kernel for rotated keys has this one: wrong where query heads share a key/value head.
    ("low_rank_attention", "places = key_bias + (g * D + low)", "places = key_bias + (g * G * D + low)"),
    ("low_rank_attention", "places + half * stride_key_bias", "places + half"),
    ("low_rank_attention", "squares / D + EPS", "squares / BLOCK_H + EPS"),
    ("low_rank_attention", "squares / D + EPS", "squares / D + 1e-3"),
    ("low_rank_attention", "norm_weight + high * stride_norm", "norm_weight + low * stride_norm"),
    ("low_rank_attention", "k_low * k_low, 1) + tl.sum(k_high * k_high, 1)", "k_low * k_low, 1)"),
    ("low_rank_attention", "new_low -= k_high", "new_low += k_high"),
    ("low_rank_attention", "at + half * stride_sin_d", "at"),
    ("low_rank_attention", "cos + b * stride_cos_b", "cos"),
    ("low_rank_attention", "n[:, None] * stride_sin_s", "n[:, None] * D"),
    ("low_rank_attention", "scores, input_precision=PRECISION) * SCALE", "scores, input_precision=PRECISION)"),
    ("low_rank_attention", "head[:, None] * stride_mask_h", "0 * head[:, None]"),
    ("low_rank_attention", "(given != 0)", "(given == 0)"),
    ("low_rank_attention", "scores += given.to(tl.float32)", "scores += given.to(tl.float32) * SCALE"),
    ("low_rank_attention", "scores = tl.where(sees, scores, NONE)", "scores = tl.where(sees, scores, -1e4)"),
    (
        "low_rank_attention",
        "shift = tl.where(peak == NONE, 0.0, peak)\n        decay = tl",
        "shift = peak\n        decay = tl",
    ),
    ("low_rank_attention", "total = total * decay + tl.sum(", "total = total + tl.sum("),
    ("low_rank_attention", "accumulated = accumulated * decay[:, None]\n", "accumulated = accumulated\n"),
    ("low_rank_attention", "w[None, :] * stride_value_latent_r", "w[None, :]"),
    ("low_rank_attention", "mask=valid[:, None] & (w < RV)[None, :]", "mask=valid[:, None] & (w < RV - 1)[None, :]"),
    ("low_rank_attention", "mask=valid[:, None] & (w < RV)[None, :]", "mask=(w < RV)[None, :]"),
    ("low_rank_attention", "w < D,\n", "w < D - 1,\n"),
    ("low_rank_attention", "value_factor + (g * D + w) *", "value_factor + w *"),
    ("low_rank_attention", "tl.store(peaks + place, peak, mask=inside)", "tl.store(peaks + place, peak)"),
    ("low_rank_attention", "tl.store(totals + place, total, mask=inside)", "tl.store(totals + place, total)"),
    ("low_rank_attention", "accumulated, mask=inside[:, None]", "accumulated"),
    ("low_rank_attention", "+ added * weight[:, None]", "+ added"),
    ("low_rank_attention", "tl.load(totals + place, mask=inside, other=0.0) * weight", "tl.load(totals + place) * 1.0"),
    ("low_rank_attention", "for z in range(0, slices)", "for z in range(0, slices - 1)"),
    ("logit_statistics", "inside = v < V", "inside = v < V - 1"),
    ("logit_statistics", "tl.max(tl.where(inside, z, NONE))", "tl.max(z) - 200.0"),
    ("logit_statistics", "exp_sum * tl.exp(before - shift).to(tl.float64)", "exp_sum"),
    ("logit_statistics", "tl.exp(z - shift), 0.0", "tl.exp(z - shift), 1.0"),
    ("logit_statistics", "tl.where(inside, z, 0.0)", "tl.where(inside, z, 1.0)"),
    ("logit_statistics", "inside & (v == place)", "inside & (v == place + 1)"),
    ("logit_statistics", "r * stride_n", "r * V"),
    ("logit_statistics", "r * stride_target", "r"),
    ("logit_statistics", "z = cap * tanh", "z = tanh"),
    ("logit_statistics", "tl.static_range(7)", "tl.static_range(6)"),
    ("logit_statistics_backward", "inside = v < V", "inside = v < V - 1"),
    ("logit_statistics_backward", "element_ty), mask=inside", "element_ty)"),
    ("logit_statistics_backward", "r * stride_n", "r * V"),
    ("logit_statistics_backward", "r * stride_d_total", "r"),
    ("logit_statistics_backward", "slope = 1.0 - tanh * tanh", "slope = 1.0 - tanh"),
    ("logit_statistics_backward", "- tl.load(log_sum", "+ 0 * tl.load(log_sum"),
    ("logit_statistics_backward", "v == tl.load(target", "v + 1 == tl.load(target"),
    ("logit_statistics_backward", "gradient * slope", "gradient"),
    ("pq_encode", "valid = s < S", "valid = s < S - 1"),
    ("pq_encode", "packed.to(tl.uint8), mask=valid", "packed.to(tl.uint8)"),
    ("pq_encode", "s[:, None] * stride_x_s", "s[:, None] * M * D"),
    ("pq_encode", "(m * D + f)[None, :] * stride_x_d", "f[None, :] * stride_x_d"),
    ("pq_encode", "wanted = (f < D) & (f < (M - m) * D)", "wanted = (f < D) & (f < (M - m - 1) * D)"),
    ("pq_encode", "wanted = (f < D) & (f < (M - m) * D)", "wanted = (f < D - 1) & (f < (M - m) * D)"),
    ("pq_encode", "tl.where((c < C)[None, :], ", "tl.where((c < CODEWORDS)[None, :], "),
    ("pq_encode", "products - norms[None, :] / 2", "products - norms[None, :]"),
    ("pq_encode", "tl.argmax(scores, 1)", "tl.argmax(scores + 1e-6 * c[None, :], 1)"),
    ("pq_encode", "<< (4 * half)", "<< (4 - 4 * half)"),
    ("pq_encode", "norms += tl.sum(", "norms = tl.sum("),
    ("pq_encode", "of, products, input", "of, input"),
    ("pq_select", "tl.minimum(row, FIRST + rows - 1) * stride_table_r", "(r[:, None] % rows) * stride_table_r"),
    ("pq_select", "h * stride_mask_h + row * stride_mask_r", "h * stride_mask_h"),
    ("pq_select", "s * stride_mask_s, mask=inside", "s, mask=inside"),
    ("pq_select", "bottom + BLOCK_R - 1, S", "bottom, S"),
    ("pq_select", "visible_range(own, own, S", "visible_range(own, own - 1, S"),
    ("pq_select", "tl.where(sees, total, -1)", "total"),
    ("pq_select", "high - low > 1", "high - low > 2"),
    ("pq_select", "(number > too_many)", "(number >= too_many)"),
    ("pq_select", "(number > too_many)", "(number <= K - reach_high)"),
    ("pq_select", "equals += tl.sum(equal)", "equals += 0"),
    ("pq_select", "taken += tl.sum(kept.to(tl.int32))", "taken += 0"),
    ("pq_select", "(head * R + FIRST + r) * K", "(head * R + r) * K"),
    ("pq_select_blocks", "inside < SIZE)[None, :]", "inside < SIZE - 1)[None, :]"),
    ("pq_select_blocks", "& (s >= begin) & (s < end)", "& (s < end)"),
    ("pq_select_blocks", "& (s >= begin) & (s < end)", "& (s >= begin) & (s < end - 1)"),
    ("pq_select_blocks", "visible_range(own, own, S", "visible_range(own, own + SIZE - 1, S"),
    ("pq_select_blocks", "n * stride_mask_n + s", "s"),
    ("pq_select_blocks", "i * stride_weights_i", "0 * i"),
    ("pq_select_blocks", "tl.minimum(level, LAST_LEVEL)", "tl.minimum(level, 64)"),
    ("pq_select_blocks", "total += tl.sum(", "total = tl.sum("),
    ("pq_select_blocks", "tl.where(seen != 0, total, -1), mask=number < L", "total, mask=number < L"),
    ("pq_select_blocks", "tl.where(seen != 0, total, -1), mask=number < L", "tl.where(seen != 0, total, -1)"),
    ("pq_select_blocks", "totals += tl.sum(", "totals = tl.sum("),
    ("pq_select_blocks", "tl.maximum(here, 0) << SHARE_BITS", "tl.maximum(here, 0) << 8"),
    ("pq_select_blocks", "tl.where(number == 0, always, share)", "share"),
    ("pq_select_blocks", "((number + 1) * SIZE > own)", "(number * SIZE > own)"),
    ("pq_select_blocks", "(number * SIZE < own + SIZE)", "(number * SIZE < own)"),
    ("pq_select_blocks", "share) * L + number", "share) * L + L - 1 - number"),
    ("pq_select_blocks", "tl.min(here, 0) < 0, -1, rank)", "tl.min(here, 0) < 0, 0, rank)"),
    ("pq_select_blocks", "always * L + number, rank)", "number, rank)"),
    ("selected_attention", "inside = (m < G * SIZE) & (row < R)", "inside = (m < G * SIZE) & (row < R - 1)"),
    ("selected_attention", "inside = (m < G * SIZE) & (row < R)", "inside = m < G * SIZE"),
    ("selected_attention", "g * G + m // SIZE", "g + m // SIZE"),
    ("selected_attention", "head * stride_query_h", "head * R * D"),
    ("selected_attention", "n.to(tl.int64) * stride_indices_n", "0 * n.to(tl.int64)"),
    ("selected_attention", "range(0, count * SIZE, BLOCK_N)", "range(0, count * SIZE - BLOCK_N, BLOCK_N)"),
    ("selected_attention", "(row + position)[:, None]", "row[:, None]"),
    ("selected_attention", "scores *= SCALE * LOG2_E", "scores *= SCALE"),
    ("selected_attention", "scores = tl.where(sees, scores, NONE)", "scores = tl.where(sees, scores, -1e4)"),
    ("selected_attention", "shift = tl.where(peak == NONE, 0.0, peak)", "shift = peak"),
    ("selected_attention", "total = total * decay + tl.sum(", "total = total + tl.sum("),
    ("selected_attention", "accumulated = accumulated * decay[:, None]\n", "accumulated = accumulated\n"),
    ("selected_attention", "wide_s[:, None] * stride_value_s", "wide_s[:, None] * E"),
    ("selected_attention", "(peak + tl.log2(sum_or_one)) / LOG2_E", "peak + tl.log2(sum_or_one)"),
    (
        "selected_attention",
        "(peak + tl.log2(sum_or_one)) / LOG2_E, mask=inside",
        "(peak + tl.log2(sum_or_one)) / LOG2_E",
    ),
    ("selected_attention", "wide_row * stride_mask_r", "0 * wide_row"),
    (
        "selected_attention_backward",
        "tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)",
        "0.0 * tl.sum(dy.to(tl.float32), 1)",
    ),
    (
        "selected_attention_backward",
        "tl.store(delta + place, own_delta, mask=inside)",
        "tl.store(delta + place, own_delta)",
    ),
    ("selected_attention_backward", "(row + position)[:, None]", "row[:, None]"),
    (
        "selected_attention_backward",
        "head * stride_doutput_h + wide_row * stride_doutput_r",
        "head * R * E + wide_row * E",
    ),
    ("selected_attention_backward", "ds = p * (dp - own_delta[:, None])", "ds = p * dp"),
    ("selected_attention_backward", "(accumulated * SCALE).to(", "accumulated.to("),
    ("selected_attention_backward", "element_ty), mask=in_d", "element_ty)"),
    ("selected_attention_backward", "valid = (in_block < SIZE) & (s < S)", "valid = s < S"),
    ("selected_attention_backward", "valid = (in_block < SIZE) & (s < S)", "valid = in_block < SIZE"),
    ("selected_attention_backward", "block + 1) - first)", "block + 1) - first - 1)"),
    ("selected_attention_backward", "order + group * CHOSEN + first", "order + group * CHOSEN"),
    ("selected_attention_backward", "(FIRST + chosen // K) * SIZE", "chosen // K * SIZE"),
    ("selected_attention_backward", "place % (G * SIZE) // SIZE", "0 * place"),
    ("selected_attention_backward", "own = row + position", "own = row"),
    ("selected_attention_backward", "of_v = tl.dot(p.to(dy.dtype), dy, of_v,", "of_v = tl.dot(p.to(dy.dtype), dy,"),
    ("selected_attention_backward", "other=0.0) + of_k * SCALE", "other=0.0) + of_k"),
    ("selected_attention_backward", "tl.load(at, mask=in_e, other=0.0) + of_v", "of_v"),
    ("selected_attention_backward", "- own_delta[None, :])", "- 0.0)"),
    ("selected_attention_backward", "stable=True)\n", "stable=True, descending=True)\n"),
]


def test_every_kernel_has_mutants() -> None:
    assert {op for op, _, _ in MUTANTS} == {op for op in SPECS if has_kernel(op, "triton")}


@cache
def most_telling_first(op: str) -> list[OpCase]:
    """The rows of an op: each kind in one dtype before the others, large ones later, gaps in memory first."""
    cases = [case for case in KERNEL_CASES if case.op == op]
    first = one_dtype(cases)

    def rank(case: OpCase) -> tuple[bool, bool, bool]:
        gaps = any(isinstance(a, torch.Tensor) and not a.is_contiguous() for a in case.make())
        return case not in first, case.large, not gaps

    return sorted(cases, key=rank)


def load_mutant(op: str, right: str, wrong: str, path: Path) -> Any:
    """The module of a kernel with `wrong` in the place of `right`, by way of a file, which Triton reads."""
    source = Path(str(import_module(f"memsave.ops.{op}.triton").__file__)).read_text()
    assert source.count(right) == 1, f"the kernel no longer contains {right!r} once: update this mutant"
    path.write_text(source.replace(right, wrong))
    spec = spec_from_file_location(f"memsave.ops.{op}.mutant", path)
    assert spec is not None and spec.loader is not None
    mutant = module_from_spec(spec)
    spec.loader.exec_module(mutant)
    return mutant


def passes(case: OpCase, launch: Callable[..., Any]) -> bool:
    try:
        interpret(case, launch)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("op, right, wrong", MUTANTS, ids=[f"{op}: {wrong}" for op, _, wrong in MUTANTS])
def test_a_broken_kernel_is_noticed(op: str, right: str, wrong: str, tmp_path: Path) -> None:
    mutant = load_mutant(op, right, wrong, tmp_path / "mutant.py")
    assert not all(passes(case, mutant.launch) for case in most_telling_first(op))
