"""The rows of the case table that the interpreter runs, and how.

bfloat16 is left out: the interpreter gets it wrong without an error. So are tensors of many rows, which take minutes;
`conftest.py` sees to it that a program adds up several rows of a small one. `tests/triton/test_gpu.py` has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.cases.ops import CASES
from tests.harness import OpCase, check, has_kernel

_ATTENTION = (
    *("odd_float32", "odd_float16", "single_keys_float32", "blocks_float32", "masked_float16", "blocks_of_64"),
    *("blocks_of_3", "head_of_128", "one_feature", "keep_none", "one_query", "causal_before", "window_not_causal"),
    *("window", "everything", "mask_along_rows_expanded", "strided", "strided_blocks", "transposed_blocks"),
    *("huge_scores_float16", "no_keys", "no_features"),
)
TELLING = {
    "pq_encode": (
        *("odd_float32", "odd_float16", "near_codewords_float32", "two_codewords", "wide_features", "one_subspace"),
        *("17_keys", "no_keys", "transposed", "strided", "equal_codewords", "between_them_in_float32", "far_from_zero"),
    ),
    "pq_select": (
        *("odd", "keep_all_but_one", "keep_more_than_there_are", "one_row", "odd_subspaces", "ties", "all_equal"),
        *("few_levels", "no_keys", "mask_of_rows_of_heads", "mask_along_rows", "mask_strided", "causal_before"),
        *("causal_beyond", "window_not_causal_before", "everything", "strided", "one_far_ahead", "beyond_the_signs"),
    ),
    "pq_select_blocks": (
        *("odd", "exponential", "five_representatives", "keep_one_not_local", "keep_more_than_there_are", "window"),
        *("blocks_of_one", "blocks_of_64", "weights_of_zero", "large_weights", "no_keys", "mask_of_rows_of_heads"),
        *("mask_strided", "causal_before", "causal_not_local", "between_blocks", "window_before", "everything"),
        *("strided", "shares_round_down", "one_weight"),
    ),
    "selected_attention": (*_ATTENTION, "turned", "growing_scores", "single_keys_float16"),
    "selected_attention_backward": (*_ATTENTION, "negative_gradients"),
}
"""Of ops with many programs for each row, the rows that differ in what a kernel does."""


def runs(case: OpCase) -> bool:
    too_many = case.name.endswith("many_rows") or case.name.startswith("tall_")
    too_many |= case.op in TELLING and case.name not in TELLING[case.op]
    return not too_many and not any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in case.make())


KERNEL_CASES = [case for case in CASES if has_kernel(case.op, "triton") and runs(case)]


def interpret(case: OpCase, launch: Callable[..., Any]) -> None:
    """The interpreter is the same in deterministic mode: once is enough."""
    check(case, launch, deterministic=(False,))
