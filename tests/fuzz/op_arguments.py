"""Random arguments for every op: right ones of any size, dtype and layout, and right ones with one thing wrong.

The case tables in tests/cases/ops say how arguments of an op are made from sizes; here the sizes are drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from memsave.ops.activation import Activation
from memsave.ops.rms_norm import Style
from tests.cases.ops import (
    activation,
    layer_norm,
    layer_norm_backward,
    logit_statistics,
    logit_statistics_backward,
    low_rank_attention,
    low_rank_mlp,
    pq_encode,
    pq_select,
    pq_select_blocks,
    pq_table,
    rms_norm,
    rms_norm_backward,
    sampled_matmul,
    sddmm,
    selected_attention,
    selected_attention_backward,
    spmm,
)
from tests.cases.ops.inputs import FLOATS, inclusion, log_normal, mask, matrix, packed, scales, seed, short

Draw = Callable[[st.SearchStrategy[Any]], Any]
MAKERS: dict[str, Callable[[Draw], tuple[Any, ...]]] = {}

_EDGES = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1025)
dtypes = st.sampled_from(FLOATS)
maybe_dtypes = st.none() | dtypes
kinds = st.sampled_from(Activation)
flags = st.booleans()


def sizes(least: int = 0, most: int = 1100) -> st.SearchStrategy[int]:
    """Small ones mostly, and those at which kernels go from one piece of their work to two."""
    edges = [size for size in _EDGES if least <= size <= most]
    return st.integers(least, min(20, most)) | st.sampled_from(edges)


def maker(function: Callable[[Draw], tuple[Any, ...]]) -> Callable[[Draw], tuple[Any, ...]]:
    """Registers what makes the arguments of the op of the same name."""
    MAKERS[function.__name__] = function
    return function


@maker
def new_seed(draw: Draw) -> tuple[Any, ...]:
    return (matrix(draw(sizes(0, 33)), draw(sizes(0, 33)), draw(dtypes)),)


@maker
def row_inclusion(draw: Draw) -> tuple[Any, ...]:
    n = draw(sizes(2))
    sigma = draw(st.sampled_from([0.0, 1.0, 4.0, 30.0]))
    return log_normal(n, sigma, draw(st.integers(0, 9))).to(draw(dtypes)), draw(st.integers(1, n - 1))


@maker
def draw_winners(draw: Draw) -> tuple[Any, ...]:
    return *row_inclusion(draw), seed(draw(st.integers(0, 2**63 - 1))), draw(flags)


@maker
def draw_rows(draw: Draw) -> tuple[Any, ...]:
    n = draw(sizes(2))
    k = draw(st.integers(1, n - 1))
    return inclusion(n, k, draw(st.sampled_from([0.0, 1.0, 5.0]))), k, seed(draw(st.integers(0, 2**63 - 1)))


@maker
def gather_rows(draw: Draw) -> tuple[Any, ...]:
    n, k = draw(sizes()), draw(sizes())
    rows = torch.randint(max(1, n), (k if n else 0,), generator=torch.Generator().manual_seed(k)).to(torch.int32)
    return matrix(n, draw(sizes(0, 300)), draw(dtypes)), rows, scales(len(rows)) if draw(flags) else None


@maker
def sampled_matmul_(draw: Draw) -> tuple[Any, ...]:
    n, d, o = draw(sizes()), draw(sizes(0, 70)), draw(sizes(0, 70))
    return sampled_matmul.arguments(n, draw(st.integers(0, n)), d, o, draw(dtypes))()


@maker
def sddmm_(draw: Draw) -> tuple[Any, ...]:
    n, r, c = draw(sizes(0, 300)), draw(sizes(0, 70)), draw(sizes(0, 70))
    return sddmm.arguments(n, r, c, draw(st.integers(0, r * c)), draw(dtypes))()


@maker
def spmm_(draw: Draw) -> tuple[Any, ...]:
    n, r, c = draw(sizes(0, 300)), draw(sizes(0, 70)), draw(sizes(0, 70))
    return spmm.arguments(n, r, c, draw(st.integers(0, r * c)), draw(flags), draw(dtypes), draw(dtypes))()


@maker
def rms_norm_(draw: Draw) -> tuple[Any, ...]:
    dtype, style = draw(dtypes), draw(st.sampled_from(Style))
    return rms_norm.arguments(draw(sizes(0, 129)), draw(sizes(1)), dtype, draw(maybe_dtypes), style, draw(flags))()


@maker
def rms_norm_backward_(draw: Draw) -> tuple[Any, ...]:
    of = draw(dtypes), draw(maybe_dtypes), draw(st.sampled_from(Style)), draw(dtypes)
    wide = draw(st.sampled_from([torch.float32, torch.float64]))
    return rms_norm_backward.arguments(draw(sizes(0, 129)), draw(sizes(1)), *of, wide, draw(flags))()


@maker
def layer_norm_(draw: Draw) -> tuple[Any, ...]:
    of = draw(dtypes), draw(maybe_dtypes), draw(maybe_dtypes), draw(flags)
    return layer_norm.arguments(draw(sizes(0, 129)), draw(sizes(1)), *of)()


@maker
def layer_norm_backward_(draw: Draw) -> tuple[Any, ...]:
    of = draw(dtypes), draw(maybe_dtypes), draw(dtypes), draw(st.sampled_from([torch.float32, torch.float64]))
    return layer_norm_backward.arguments(draw(sizes(0, 129)), draw(sizes(1)), *of, (draw(flags), draw(flags)))()


def _elementwise(tensors: int) -> Callable[[Draw], tuple[Any, ...]]:
    def make(draw: Draw) -> tuple[Any, ...]:
        n, f, dtype = draw(sizes(0, 65)), draw(sizes()), draw(dtypes)
        return *(activation.numbers(n, f, dtype, value) for value in range(tensors)), int(draw(kinds))

    return make


MAKERS |= {
    "activation": _elementwise(1),
    "activation_backward": _elementwise(2),
    "gated_activation": _elementwise(2),
    "gated_activation_backward": _elementwise(3),
}


@maker
def low_rank_attention_(draw: Draw) -> tuple[Any, ...]:
    kv, half = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    shown = draw(st.sampled_from([None, low_rank_attention.some, low_rank_attention.added]))
    return low_rank_attention.arguments(
        *(draw(st.integers(1, 3)), kv * draw(st.integers(1, 3)), kv),
        *(draw(sizes(1, 65)), draw(sizes(1, 65)), 2 * half, draw(sizes(0, 20)), draw(sizes(0, 20))),
        draw(dtypes),
        biases=draw(flags),
        turned=draw(flags),
        norm=draw(flags),
        mask=shown,
        is_causal=draw(flags),
    )


@maker
def low_rank_mlp_(draw: Draw) -> tuple[Any, ...]:
    wanted = *(draw(sizes(0, 129)) for _ in range(2)), *(draw(sizes(0, 33)) for _ in range(3))
    return low_rank_mlp.arguments(wanted, draw(dtypes), draw(kinds), draw(flags), draw(flags))  # type: ignore[arg-type]


def _codebook(draw: Draw) -> dict[str, int]:
    return {"M": draw(st.integers(1, 9)), "C": draw(st.integers(1, 16)), "d": draw(sizes(1, 20))}


def _heads(draw: Draw, rows: str) -> dict[str, int]:
    return {"B": draw(st.integers(0, 3)), "H": draw(st.integers(1, 3)), rows: draw(sizes(0, 70))}


@maker
def pq_encode_(draw: Draw) -> tuple[Any, ...]:
    return pq_encode.arguments(**_heads(draw, "S"), **_codebook(draw), dtype=draw(dtypes))


@maker
def pq_table_(draw: Draw) -> tuple[Any, ...]:
    return pq_table.arguments(**_heads(draw, "R"), **_codebook(draw), dtype=draw(dtypes))


def _seen(draw: Draw) -> dict[str, Any]:
    return {
        "mask": draw(st.none() | st.sampled_from(list(pq_select.MASKS.values()))),
        "is_causal": draw(flags),
        "window": draw(st.just(0) | st.integers(0, 80) | st.just(2**40)),
        "position": draw(st.integers(-90, 90) | st.sampled_from([-(2**40), 2**40])),
    }


@maker
def pq_select_(draw: Draw) -> tuple[Any, ...]:
    rows = {"R": draw(sizes(1, 40)), "S": draw(sizes(1, 300)), "M": draw(st.integers(1, 9))}
    return pq_select.arguments(
        B=draw(st.integers(1, 3)), H=draw(st.integers(1, 3)), **rows, keep=draw(sizes(1, 300)), **_seen(draw)
    )


@maker
def pq_select_blocks_(draw: Draw) -> tuple[Any, ...]:
    rows = {"N": draw(sizes(1, 20)), "r": draw(st.integers(1, 3)), "S": draw(sizes(1, 300))}
    return pq_select_blocks.arguments(
        *(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        **rows,
        M=draw(st.integers(1, 9)),
        block_size=draw(sizes(1, 65)),
        keep=draw(sizes(1, 33)),
        local=draw(flags),
        **_seen(draw),
    )


@maker
def selected_attention_(draw: Draw) -> tuple[Any, ...]:
    kv, block_size = draw(st.integers(1, 2)), draw(st.just(1) | st.sampled_from([2, 5, 16]))
    seen = {} if block_size == 1 else _seen(draw)
    return selected_attention.arguments(
        *(draw(st.integers(1, 2)), kv * draw(st.integers(1, 3)), kv),
        *(draw(sizes(1, 65)), draw(sizes(1, 300)), draw(sizes(1, 257)), draw(sizes(1, 65))),
        *(draw(sizes(0, 33)), block_size, draw(dtypes)),
        **seen,
    )


@maker
def selected_attention_backward_(draw: Draw) -> tuple[Any, ...]:
    return selected_attention_backward.with_gradients(lambda: selected_attention_(draw))


@maker
def pack_bits(draw: Draw) -> tuple[Any, ...]:
    return (mask(draw(sizes(0, 129)), draw(sizes())),)


@maker
def masked_scale(draw: Draw) -> tuple[Any, ...]:
    n, d = draw(sizes(0, 65)), draw(sizes())
    return matrix(n, d, draw(dtypes)), packed(n, d), draw(st.sampled_from([0.0, 1.0, 1 / 0.9, 3e38]))


@maker
def logit_statistics_(draw: Draw) -> tuple[Any, ...]:
    n, classes, softcap = draw(sizes(0, 65)), draw(sizes(1)), draw(st.sampled_from([None, 0.5, 30.0]))
    return logit_statistics.arguments(n, classes, draw(dtypes), softcap)()


@maker
def logit_statistics_backward_(draw: Draw) -> tuple[Any, ...]:
    n, classes, softcap = draw(sizes(0, 65)), draw(sizes(1)), draw(st.sampled_from([None, 0.5, 30.0]))
    return logit_statistics_backward.arguments(n, classes, draw(dtypes), softcap)()


MAKERS = {name.rstrip("_"): make for name, make in MAKERS.items()}


def described(args: tuple[Any, ...]) -> str:
    """What an example is, in a line."""
    return ", ".join(
        f"{short(a.dtype)}{tuple(a.shape)} by {a.stride()} on {a.device}" if isinstance(a, Tensor) else repr(a)
        for a in args
    )
