"""Plain PyTorch implementation of `low_rank_mlp`, which never holds the hidden activations of all rows.

N rows, F hidden units, ranks R1, R2 and R.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..activation import reference
from . import chunks


def low_rank_mlp(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    kind: int,
) -> Tensor:
    activation = partial(reference.activation, kind=kind)
    return chunks.in_chunks(p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down, activation)


def workspace_bytes(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    kind: int,
) -> int:
    inside = partial(reference.workspace_bytes, kind=kind)
    return chunks.workspace_bytes(p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down, inside)
