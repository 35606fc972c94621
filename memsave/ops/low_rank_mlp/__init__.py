"""The feed-forward block of a model with factored weights, between its factors, without the hidden activations.

N rows, F hidden units. The gate, up and down projections are products of two matrices each, of ranks R1, R2 and R:
p_gate and p_up are the rows after the first factors, the result is the rows before the last one. FlashSVD, arXiv
2508.01506.
"""

from __future__ import annotations

from torch import Tensor

from .. import _check
from .._library import register
from ..activation import check_kind
from . import reference

_op = register(
    "low_rank_mlp(Tensor p_gate, Tensor expand_gate, Tensor? bias_gate, Tensor? p_up, Tensor? expand_up, "
    "Tensor? bias_up, Tensor reduce_down, int kind) -> Tensor",
    fake=lambda p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down, kind: p_gate.new_empty(
        (p_gate.shape[0], reduce_down.shape[0])
    ),
    reference=reference,
    kernels=("triton",),
)


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
    """h @ reduce_down^T with h = act(p_gate @ expand_gate^T + bias_gate) * (p_up @ expand_up^T + bias_up).

    Without p_up and expand_up, of a plain block, h has no second factor. Sums are accumulated at least in float32. Half
    types round act(gate) before it is multiplied, and h. Float64 and an R above what the Triton kernel holds (1024, of
    float32 512) are served by plain PyTorch on a GPU, too.

    Args:
        p_gate: (N, R1) floating point, any strides, as all of them may have.
        expand_gate: (F, R1) dtype of p_gate.
        bias_gate: (F,) dtype of p_gate, or None.
        p_up: (N, R2) dtype of p_gate, or None.
        expand_up: (F, R2) dtype of p_gate; None where p_up is.
        bias_up: (F,) dtype of p_gate, or None.
        reduce_down: (R, F) dtype of p_gate: the first factor of the down projection.
        kind: an `Activation`.

    Returns:
        (N, R), contiguous, dtype of p_gate.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, one of p_up and expand_up without
            the other, bias_up without them, an unknown kind.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("p_gate", p_gate, 2)
    _check.typed("expand_gate", expand_gate, p_gate.dtype, 2)
    _check.typed("reduce_down", reduce_down, p_gate.dtype, 2)
    features = expand_gate.shape[0]
    _check_projection("gate", p_gate, expand_gate, bias_gate, features)
    _check_columns("reduce_down", reduce_down, features, "rows of expand_gate")
    if p_up is not None and expand_up is not None:
        _check.typed("p_up", p_up, p_gate.dtype, 2)
        _check.length("p_up", p_up, p_gate.shape[0], "rows of p_gate")
        _check.typed("expand_up", expand_up, p_gate.dtype, 2)
        _check_projection("up", p_up, expand_up, bias_up, features)
    elif p_up is not None or expand_up is not None or bias_up is not None:
        given = {"p_up": p_up, "expand_up": expand_up, "bias_up": bias_up}
        words = ", ".join(f"{name} {'None' if value is None else 'a tensor'}" for name, value in given.items())
        raise ValueError(
            f"a gated block needs p_up and expand_up, a plain one has neither and no bias_up; got {words}."
        )
    check_kind(kind)
    _check.same_device(
        p_gate=p_gate,
        expand_gate=expand_gate,
        bias_gate=bias_gate,
        p_up=p_up,
        expand_up=expand_up,
        bias_up=bias_up,
        reduce_down=reduce_down,
    )
    return _op(p_gate, expand_gate, bias_gate, p_up, expand_up, bias_up, reduce_down, int(kind))


def _check_projection(name: str, p: Tensor, expand: Tensor, bias: Tensor | None, features: int) -> None:
    """p (N, R), expand (F, R), bias (F,) or None."""
    _check.length(f"expand_{name}", expand, features, "hidden units")
    _check_columns(f"expand_{name}", expand, p.shape[1], f"columns of p_{name}")
    if bias is not None:
        _check.typed(f"bias_{name}", bias, p.dtype, 1)
        _check.length(f"bias_{name}", bias, features, "hidden units")


def _check_columns(name: str, matrix: Tensor, expected: int, of: str) -> None:
    if matrix.shape[1] != expected:
        raise ValueError(
            f"{name} must have one column for each of the {expected} {of}; got shape {tuple(matrix.shape)}."
        )
