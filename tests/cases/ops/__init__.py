"""The case table of the ops: every row drives every implementation, opcheck and the sanitizers.

A file for each op, with `SPEC` (what is right) and `CASES` (the rows). `inputs.py` has values to build rows from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tests.harness import OpCase, OpSpec

from . import (
    activation,
    activation_backward,
    draw_rows,
    draw_winners,
    gated_activation,
    gated_activation_backward,
    gather_rows,
    layer_norm,
    layer_norm_backward,
    logit_statistics,
    logit_statistics_backward,
    low_rank_attention,
    low_rank_mlp,
    masked_scale,
    new_seed,
    pack_bits,
    pq_encode,
    pq_select,
    pq_select_blocks,
    pq_table,
    rms_norm,
    rms_norm_backward,
    row_inclusion,
    sampled_matmul,
    sddmm,
    selected_attention,
    selected_attention_backward,
    spmm,
)

_TABLES = (
    *(new_seed, row_inclusion, draw_winners, draw_rows, gather_rows, sampled_matmul, sddmm, spmm),
    *(rms_norm, rms_norm_backward, layer_norm, layer_norm_backward),
    *(activation, activation_backward, gated_activation, gated_activation_backward),
    *(low_rank_attention, low_rank_mlp),
    *(pq_encode, pq_table, pq_select, pq_select_blocks, selected_attention, selected_attention_backward),
    *(pack_bits, masked_scale, logit_statistics, logit_statistics_backward),
)

SPECS: dict[str, OpSpec] = {table.SPEC.name: table.SPEC for table in _TABLES}
CASES: list[OpCase] = [case for table in _TABLES for case in table.CASES]


def cases_of(*ops: str, large: bool | None = None) -> list[OpCase]:
    """The rows of the named ops; `large=False` leaves out the large ones."""
    return [case for case in CASES if case.op in ops and large in (None, case.large)]


def one_dtype(cases: Iterable[OpCase]) -> list[OpCase]:
    """The first row of each kind: rows of an op that differ in the dtypes in their names alone count once."""
    first: dict[tuple[str, str], OpCase] = {}
    for case in cases:
        first.setdefault((case.op, re.sub(r"_?b?float\d\d", "", case.name)), case)
    return list(first.values())
