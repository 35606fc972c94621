"""Implementations with one mistake each, which the harness must notice; each is right on most rows or in most bytes.

N rows, D and O features, k kept rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memsave.ops.draw_rows.reference import draw_rows
from memsave.ops.draw_winners.reference import draw_winners
from memsave.ops.gather_rows.reference import gather_rows
from memsave.ops.logit_statistics_backward.reference import logit_statistics_backward
from memsave.ops.row_inclusion.reference import row_inclusion
from memsave.ops.sampled_matmul.reference import sampled_matmul


class Mistake(NamedTuple):
    """`says` is a regular expression for the harness's words."""

    op: str
    says: str
    implementation: Callable[..., Any]


MISTAKES: dict[str, Mistake] = {}
_runs = count()


def mistake(op: str, says: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        MISTAKES[function.__name__] = Mistake(op, says, function)
        return function

    return add


@mistake("gather_rows", r"first at \(10, 0\): 0.0, expected")
def dropped_last_row(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    out = gather_rows(x, rows, scale)
    out[-1:] = 0
    return out


@mistake("sampled_matmul", "error .* against float64, the budget is")
def dropped_last_row_of_a_sum(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return sampled_matmul(dy, kept[:-1], rows[:-1], scale[:-1])


@mistake("gather_rows", "_scaled .* elements differ")
def missing_scale(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return gather_rows(x, rows, None)


@mistake("gather_rows", r"nan, expected")
def unwritten_output(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    out = x.new_empty(rows.shape[0], x.shape[1])
    out[:, :-1] = gather_rows(x, rows, scale)[:, :-1]
    return out


@mistake("sampled_matmul", "no_rows_kept.* error nan")
def unwritten_empty_sum(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return sampled_matmul(dy, kept, rows, scale) if len(rows) else dy.new_empty(dy.shape[1], kept.shape[1])


@mistake("gather_rows", r"first at \(0, 18\): 0.0, expected")
def mask_one_too_short(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    inside = torch.arange(x.shape[1]) < x.shape[1] - 1
    return torch.where(inside, gather_rows(x, rows, scale), 0.0).to(x.dtype)


@mistake("sampled_matmul", "error nan")
def mask_one_too_long(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Reads one row behind `kept`, with a factor of zero."""
    k, d = kept.shape
    longer = kept.as_strided((k + 1, d), kept.stride())
    return sampled_matmul(dy, longer, torch.cat([rows, rows.new_zeros(1)]), torch.cat([scale, scale.new_zeros(1)]))


@mistake("gather_rows", "a new tensor of shape .* was written behind its memory")
def writes_behind_its_output(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    out = torch.empty(rows.shape[0], x.shape[1], dtype=x.dtype)
    out.as_strided((out.numel() + 1,), (1,)).zero_()
    return out.copy_(gather_rows(x, rows, scale))


@mistake("draw_rows", "a new tensor of shape .* was written behind its memory")
def writes_behind_zeros(q: Tensor, k: int, seed: Tensor) -> Tensor:
    hits = torch.zeros(k, dtype=torch.int32)
    hits.as_strided((k + 1,), (1,)).fill_(7)
    return hits.copy_(draw_rows(q, k, seed))


@mistake("gather_rows", "argument 1 was written before its memory")
def writes_before_an_input(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    rows.as_strided((1,), (1,), rows.storage_offset() - 1).fill_(-1)
    return gather_rows(x, rows, scale)


@mistake("gather_rows", "beyond_float32_integers")
def index_in_float32(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return gather_rows(x, rows.float().to(torch.int32), scale)


@mistake("row_inclusion", "elements differ")
def integers_in_float32(weights: Tensor, k: int) -> Tensor:
    return row_inclusion(weights, k).float().long()


@mistake("gather_rows", "argument 2 was modified in place")
def modified_input(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    out = gather_rows(x, rows, scale)
    if scale is not None:
        scale.mul_(2)
    return out


@mistake("gather_rows", "output 0 shares the memory of argument 0")
def output_is_an_input(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None and len(rows) == len(x) else gather_rows(x, rows, scale)


@mistake("draw_winners", "output 1 shares the memory of output 0")
def outputs_share_memory(weights: Tensor, k: int, seed: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    rows, _ = draw_winners(weights, k, seed, winners)
    return rows, rows.view(torch.float32)


@mistake("draw_winners", "output 1: .* elements differ")
def second_output_wrong(weights: Tensor, k: int, seed: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    rows, scale = draw_winners(weights, k, seed, winners)
    return rows, torch.ones_like(scale)


@mistake("draw_winners", "1 outputs, expected 2")
def second_output_missing(weights: Tensor, k: int, seed: Tensor, winners: bool) -> Tensor:
    return draw_winners(weights, k, seed, winners)[0]


@mistake("gather_rows", "output 0 is a view: .* in memory for")
def output_holds_more_than_itself(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return gather_rows(x, torch.cat([rows, rows]), None if scale is None else torch.cat([scale, scale]))[: len(rows)]


@mistake("gather_rows", "output 0 is not contiguous")
def output_not_contiguous(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return gather_rows(x, rows, scale).t().contiguous().t()


@mistake("sampled_matmul", "dtype torch.float32, expected torch.float16")
def wrong_output_dtype(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return sampled_matmul(dy.float(), kept.float(), rows, scale)


@mistake("sampled_matmul", r"shape \(19, 23\), expected \(23, 19\)")
def transposed_output(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return sampled_matmul(dy, kept, rows, scale).t().contiguous()


@mistake("sampled_matmul", "bfloat16 .*error .* the budget is")
def sum_in_bfloat16(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    if dy.dtype != torch.bfloat16:
        return sampled_matmul(dy, kept, rows, scale)
    total = dy.new_zeros(dy.shape[1], kept.shape[1])
    for gradient, value in zip(gather_rows(dy, rows, scale), kept, strict=True):
        total += gradient[:, None] * value
    return total


@mistake("sampled_matmul", "float64 .*error .* the budget is")
def float64_computed_in_float32(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return sampled_matmul(dy.float(), kept.float(), rows, scale).to(dy.dtype)


@mistake("gather_rows", "strided|transposed|column_slice")
def strides_ignored(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    return gather_rows(x.as_strided(x.shape, (x.shape[1], 1)), rows, scale)


@mistake("row_inclusion", "not_finite|all_nan")
def nan_counts_as_zero(weights: Tensor, k: int) -> Tensor:
    return row_inclusion(weights.nan_to_num(nan=0.0), k)


@mistake("gather_rows", "new memory holds 12345")
def depends_on_stale_memory(x: Tensor, rows: Tensor, scale: Tensor | None) -> Tensor:
    """A maximum with what was there before: NaN loses every comparison."""
    stale = x.new_empty(rows.shape[0], x.shape[1])
    return torch.fmax(gather_rows(x, rows, scale), stale)


@mistake("sampled_matmul", "not the same bits in two runs")
def different_every_time(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """One rounding off in every other run: within the budget."""
    product = sampled_matmul(dy, kept, rows, scale)
    return torch.nextafter(product, product + 1) if next(_runs) % 2 else product


@mistake("sampled_matmul", "deterministic mode.* not the same bits in two runs")
def different_in_deterministic_mode_only(dy: Tensor, kept: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    if torch.are_deterministic_algorithms_enabled():
        return different_every_time(dy, kept, rows, scale)
    return sampled_matmul(dy, kept, rows, scale)


@mistake("new_seed", "not the same bits in two runs")
def seed_from_a_private_generator(like: Tensor) -> Tensor:
    """Activation checkpointing could not replay it."""
    return torch.tensor(next(_runs))


@mistake("logit_statistics_backward", "argument 2 was modified in place")
def writes_to_more_than_it_declares(logits: Tensor, target: Tensor, peak: Tensor, *rest: Any) -> None:
    logit_statistics_backward(logits, target, peak, *rest)
    peak.add_(1)


@mistake("logit_statistics_backward", "argument 0 was written between its elements")
def writes_between_elements(logits: Tensor, *rest: Any) -> None:
    logit_statistics_backward(logits, *rest)
    if logits.numel() and logits.stride(1) == 2:
        logits.as_strided((1,), (1,), logits.storage_offset() + 1).zero_()


@mistake("logit_statistics_backward", "error .* against float64, the budget is")
def leaves_what_it_must_write_to(logits: Tensor, *rest: Any) -> None:
    logit_statistics_backward(logits.clone(), *rest)
