"""Some rows of `low_rank_mlp` at a time in plain PyTorch, so that few hidden activations are there at once.

It serves as the reference, and on a GPU what the Triton kernel does not take; each brings its own activation function.

N rows, F hidden units, ranks R1, R2 and R.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..sddmm.blocks import as_operand, operand_bytes

# Of one hidden matrix: what stays in the cache of a CPU; a GPU takes more at once, or launches would take the time.
CPU_CHUNK_BYTES, CHUNK_BYTES = 4 * 2**20, 64 * 2**20
MULTIPLE_ROWS = 64


def in_chunks(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    out = p_gate.new_empty((p_gate.shape[0], reduce_down.shape[0]))
    expand_gate, down = as_operand(expand_gate), as_operand(reduce_down).t()
    expand_up = None if expand_up is None else as_operand(expand_up)
    size = chunk_rows(p_gate, expand_gate)
    with torch.autocast(p_gate.device.type, enabled=False):
        for first in range(0, out.shape[0], size):
            rows = slice(first, first + size)
            h = activation(projected(p_gate[rows], expand_gate, bias_gate))
            if p_up is not None and expand_up is not None:
                h.mul_(projected(p_up[rows], expand_up, bias_up))
            torch.mm(h, down, out=out[rows])
            del h  # or it would still be there beside those of the next rows
    return out


def chunk_rows(p_gate: Tensor, expand_gate: Tensor) -> int:
    """How many rows are computed at once, of p_gate (N, R1) and expand_gate (F, R1)."""
    chunk_bytes = CPU_CHUNK_BYTES if p_gate.device.type == "cpu" else CHUNK_BYTES
    row_bytes = max(1, expand_gate.shape[0] * p_gate.element_size())
    return max(1, chunk_bytes // row_bytes // MULTIPLE_ROWS) * MULTIPLE_ROWS


def projected(p: Tensor, expand: Tensor, bias: Tensor | None) -> Tensor:
    """(N, R), (F, R), (F,) -> (N, F)."""
    rows = as_operand(p)
    return rows @ expand.t() if bias is None else torch.addmm(bias, rows, expand.t())


def workspace_bytes(
    p_gate: Tensor,
    expand_gate: Tensor,
    bias_gate: Tensor | None,
    p_up: Tensor | None,
    expand_up: Tensor | None,
    bias_up: Tensor | None,
    reduce_down: Tensor,
    activation_bytes: Callable[[Tensor], int],
) -> int:
    """Copies of weights that products do not take as they are, and for some rows h and what it is made of.

    Args:
        activation_bytes: what the activation function takes for a matrix, beside its result.
    """
    copied = sum(operand_bytes(w) for w in (expand_gate, expand_up, reduce_down) if w is not None)
    rows = slice(min(p_gate.shape[0], chunk_rows(p_gate, expand_gate)))
    hidden = p_gate.new_empty((p_gate[rows].shape[0], expand_gate.shape[0]), device="meta")
    hidden_bytes = hidden.numel() * hidden.element_size()
    activated = 2 * hidden_bytes + activation_bytes(hidden)
    multiplied = 0 if p_up is None else 2 * hidden_bytes + operand_bytes(p_up[rows])
    return copied + max(operand_bytes(p_gate[rows]) + hidden_bytes, activated, multiplied)
