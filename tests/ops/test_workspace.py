"""The bytes that an op declares to allocate inside itself are those that it allocates."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from memsave import ops
from memsave.ops import _native
from memsave.ops.rms_norm import Style
from tests.cases.ops import (
    pq_encode,
    pq_select,
    pq_select_blocks,
    selected_attention,
    selected_attention_backward,
)
from tests.cases.ops.inputs import (
    FLOATS,
    inclusion,
    log_normal,
    mask,
    matrix,
    packed,
    row_indices,
    scales,
    seed,
    short,
    strided,
)
from tests.ops.allocations import peak_inside_bytes

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    found: dict[str, tuple[str, tuple[Any, ...]]] = {"new_seed": ("new_seed", (torch.ones(3),))}
    for n, k in [(10, 9), (1000, 300), (20_000, 17_000)]:
        found[f"row_inclusion-{n}-{k}"] = "row_inclusion", (log_normal(n), k)
        found[f"draw_rows-{n}-{k}"] = "draw_rows", (inclusion(n, k), k, seed(1))
        found[f"crs-{n}-{k}"] = "draw_winners", (log_normal(n), k, seed(1), False)
        found[f"wta_crs-{n}-{k}"] = "draw_winners", (log_normal(n), k, seed(1), True)
    for dtype in FLOATS:
        x, rows, scale = matrix(400, 96, dtype), row_indices(400, 100), scales(100)
        found[f"gather_rows-{short(dtype)}"] = "gather_rows", (x, rows, scale)
        found[f"gather_rows-plain-{short(dtype)}"] = "gather_rows", (x, rows, None)
        found[f"gather_rows-transposed-{short(dtype)}"] = "gather_rows", (x.t(), row_indices(96, 30), scales(30))
        if dtype != torch.bfloat16:  # there torch's own product allocates too, as much as suits the CPU
            for d in (8, 300):
                found[f"sampled_matmul-{d}-{short(dtype)}"] = "sampled_matmul", (x, matrix(100, d, dtype), rows, scale)
    return found


def norm_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every style, dtype and mixture of dtypes of RMSNorm, and its gradients with and without the weight's."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for dtype in FLOATS:
        x, dy, double = matrix(400, 96, dtype), matrix(400, 96, dtype, value=5), dtype == torch.float64
        rstd = torch.ones(400, dtype=torch.float64 if double else torch.float32)
        for weight_dtype in (None, dtype, torch.float32):
            weight = None if weight_dtype is None else torch.ones(96, dtype=weight_dtype)
            for style in Style:
                name = f"{style.name}-{short(dtype)}-{weight_dtype}"
                found[f"rms_norm-{name}"] = "rms_norm", (x, weight, 1e-6, style, double)
                for needed in (True, False):
                    args = dy, x, rstd, weight, style, needed
                    found[f"rms_norm_backward-{name}-{needed}"] = "rms_norm_backward", args
        found[f"rms_norm-transposed-{short(dtype)}"] = "rms_norm", (x.t(), None, 1e-6, Style.ONE_PLUS, double)
        transposed = dy.t(), x.t(), rstd[:96], None, Style.ONE_PLUS, False
        found[f"rms_norm_backward-transposed-{short(dtype)}"] = "rms_norm_backward", transposed
    return found


def bit_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for d in (96, 93, 3):
        found[f"pack_bits-{d}"] = "pack_bits", (mask(400, d),)
        for dtype in FLOATS:
            args = matrix(400, d, dtype), packed(400, d), 2.0
            found[f"masked_scale-{d}-{short(dtype)}"] = "masked_scale", args
    for dtype in FLOATS:
        transposed = matrix(400, 90, dtype).t(), packed(90, 400), 2.0
        found[f"masked_scale-transposed-{short(dtype)}"] = "masked_scale", transposed
    return found | {"pack_bits-transposed": ("pack_bits", (mask(400, 90).t(),))}


def logit_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every dtype with and without a softcap: one block of rows, and several."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for dtype in FLOATS:
        for n, classes in ((40, 300), (50, 100_000)):
            logits, target = matrix(n, classes, dtype), torch.arange(n)
            numbers = [torch.ones(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)] * 5
            for softcap in (None, 5.0):
                name = f"{n}-{short(dtype)}-{softcap}"
                found[f"logit_statistics-{name}"] = "logit_statistics", (logits, target, softcap)
                args = logits, target, *numbers, softcap
                found[f"logit_statistics_backward-{name}"] = "logit_statistics_backward", args
        transposed = logits.t(), torch.zeros(classes, dtype=torch.int64), None
        found[f"logit_statistics-transposed-{short(dtype)}"] = "logit_statistics", transposed
    return found


def layer_norm_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every dtype and mixture of dtypes of LayerNorm, and its gradients with and without those of the parameters."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for dtype in FLOATS:
        x, dy = matrix(400, 96, dtype), matrix(400, 96, dtype, value=5)
        rstd = torch.ones(400, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for of in (None, dtype, torch.float32):
            weight = None if of is None else torch.ones(96, dtype=of)
            for flag in (True, False):
                name = f"{short(dtype)}-{of}-{flag}"
                found[f"layer_norm-{name}"] = "layer_norm", (x, weight, weight, 1e-5, flag)
                found[f"layer_norm_backward-{name}"] = "layer_norm_backward", (dy, x, rstd, weight, flag, flag)
        found[f"layer_norm-transposed-{short(dtype)}"] = "layer_norm", (x.t(), None, None, 1e-5, False)
        transposed = dy.t(), x.t(), rstd[:96], None, True, False
        found[f"layer_norm_backward-transposed-{short(dtype)}"] = "layer_norm_backward", transposed
    return found


def sddmm_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every dtype; products in one block and in several, operands that need a copy, and few and many entries."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for dtype in FLOATS:
        if dtype != torch.bfloat16:  # as above
            for r, c, k in ((96, 300, 50), (96, 300, 20_000), (600, 40, 700), (70, 40_000, 900)):
                args = matrix(300, r, dtype), matrix(300, c, dtype, value=5), row_indices(r * c, k)
                found[f"sddmm-{r}-{c}-{k}-{short(dtype)}"] = "sddmm", args
            a, b, indices = matrix(300, 96, dtype), matrix(300, 80, dtype, value=5), row_indices(96 * 80, 99)
            found[f"sddmm-transposed-{short(dtype)}"] = "sddmm", (a.t().contiguous().t(), b, indices)
            found[f"sddmm-strided-{short(dtype)}"] = "sddmm", (strided(a), strided(b), strided(indices))
            found[f"sddmm-expanded-{short(dtype)}"] = (
                "sddmm",
                (a[:1].expand(300, 96), b[:, :1].expand(300, 80), indices),
            )
    return found


def spmm_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Every dtype, both ways; x of every layout, one row of x or of the result, and few, many and no entries."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for dtype in FLOATS:
        for transposed in (False, True):
            way = f"{short(dtype)}-{transposed}"
            for n, r, c, k in ((300, 96, 300, 50), (300, 70, 90, 5000), (1, 70, 4000, 900), (40, 30, 50, 700)):
                x, v, indices = matrix(n, c if transposed else r, dtype), scales(k), row_indices(r * c, k)
                args = (indices, r, c, transposed)
                found[f"spmm-{n}-{k}-{way}"] = "spmm", (x, v.to(dtype), *args)
                found[f"spmm-mixed-{n}-{k}-{way}"] = "spmm", (x, v, *args)
                found[f"spmm-turned-{n}-{k}-{way}"] = "spmm", (x.t().contiguous().t(), v, *args)
                strides = strided(x), strided(v), strided(indices), r, c, transposed
                found[f"spmm-strided-{n}-{k}-{way}"] = "spmm", strides
            none = matrix(300, 96, dtype), scales(0), row_indices(96, 0), 96, 96, transposed
            found[f"spmm-none-{way}"] = "spmm", none
    return found


def code_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Product quantization: every layout, one chunk of rows and several."""
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for layout in pq_encode.LAYOUTS:
        for dtype in (torch.float32, torch.bfloat16):
            args = pq_encode.arguments(S=300, M=5, d=8, C=13, dtype=dtype, layout=layout)
            found[f"pq_encode-{layout}-{short(dtype)}"] = "pq_encode", args
            found[f"pq_table-{layout}-{short(dtype)}"] = "pq_table", args
    sizes: dict[str, dict[str, Any]] = {
        "few": {"S": 90},
        "strided": {"S": 90, "layout": "strided"},
        "one_subspace": {"S": 90, "M": 1},
        "many": {"S": 700, "M": 3},
        "most": {"S": 700, "M": 3, "keep": 700},
    }
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "window": 40, "position": 3},
        "masked": {"mask": pq_select.some},
        "mask_of_rows": {"mask": pq_select.MASKS["of_rows"], "is_causal": True},
        "padded": {"mask": pq_select.padded, "is_causal": True},
    }
    for size, of_size in sizes.items():
        for way, of_way in ways.items():
            args = pq_select.arguments(**{"R": 250, "keep": 20} | of_size | of_way)
            found[f"pq_select-{size}-{way}"] = "pq_select", args
            more = {"keep": 5} if size == "most" else {}
            args = pq_select_blocks.arguments(**{"N": 250, "block_size": 16} | of_size | of_way | more)
            found[f"pq_select_blocks-{size}-{way}"] = "pq_select_blocks", args
    return found


def selected_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Single keys and blocks, one chunk of them and several, every layout."""
    sizes: dict[str, dict[str, Any]] = {
        "single": {"keep": 20, "S": 300},
        "many_single": {"keep": 200, "S": 400, "D": 48},
        "blocks": {"block_size": 16, "is_causal": True},
        "many_blocks": {"block_size": 16, "keep": 20, "R": 700, "S": 700, "is_causal": True, "E": 40},
        "masked": {"block_size": 16, "R": 410, "S": 390, "mask": pq_select.some, "keep": 9},
        "padded": {"block_size": 16, "R": 410, "S": 390, "mask": pq_select.padded, "window": 50},
        "half": {"block_size": 32, "keep": 6, "R": 800, "S": 800, "dtype": torch.bfloat16},
        "transposed": {"block_size": 32, "R": 400, "S": 400, "layout": "transposed", "dtype": torch.float16},
        "turned": {"block_size": 16, "R": 400, "S": 400, "layout": "turned"},
        "strided": {"block_size": 16, "R": 400, "S": 390, "layout": "strided"},
        "double": {"block_size": 16, "R": 400, "S": 390, "dtype": torch.float64, "kv": 4},
        "wide": {"R": 50, "S": 90, "D": 300, "keep": 20},
        "none": {"keep": 0},
    }
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name, settings in sizes.items():
        make = partial(selected_attention.arguments, **{"R": 200, "S": 210, "D": 24} | settings)
        found[f"selected_attention-{name}"] = "selected_attention", make()
        args = selected_attention_backward.with_gradients(make, spread=name == "strided")
        found[f"selected_attention_backward-{name}"] = "selected_attention_backward", args
    return found


CALLS = {
    **(spmm_calls() | sddmm_calls() | calls() | norm_calls() | layer_norm_calls() | bit_calls() | logit_calls()),
    **(code_calls() | selected_calls()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CALLS)
def test_declared_bytes_are_those_that_the_profiler_sees(name: str, backend: str) -> None:
    op, args = CALLS[name]
    with ops.use_backend(backend):
        getattr(ops, op)(*args)  # what is allocated once only
        seen = peak_inside_bytes(lambda: getattr(ops, op)(*args))
        declared = ops.workspace_bytes(op, args)
    # Another version of torch may allocate a scalar more.
    assert abs(declared - seen) <= 64, f"declared {declared}, seen {seen}"


def test_overloads_names_keywords_and_fake_tensors() -> None:
    x, rows, scale = matrix(40, 8), row_indices(40, 10), scales(10)
    with ops.use_reference():
        expected = 10 * 8 * 4
        for func in (torch.ops.memsave.gather_rows.default, "memsave::gather_rows", "gather_rows"):
            assert ops.workspace_bytes(func, (x, rows, scale)) == expected
        assert ops.workspace_bytes("gather_rows", (x,), {"scale": scale, "rows": rows}) == expected
        meta = [tensor.to("meta") for tensor in (x, rows, scale)]
        assert ops.workspace_bytes("gather_rows", meta) == expected


def test_other_ops_have_none() -> None:
    assert ops.workspace_bytes(torch.ops.aten.mm.default, (matrix(3, 3), matrix(3, 3))) == 0
    assert ops.workspace_bytes("aten::mm", (matrix(3, 3), matrix(3, 3))) == 0
    assert ops.workspace_bytes("unknown", ()) == 0


@pytest.mark.skipif(_native.library() is None, reason=f"no C++ kernels: {_native.state()}")
def test_the_kernels_allocate_less_than_plain_pytorch() -> None:
    for name in ("row_inclusion-1000-300", "draw_rows-1000-300", "gather_rows-bfloat16"):
        op, args = CALLS[name]
        native = ops.workspace_bytes(op, args)
        with ops.use_reference():
            assert native < ops.workspace_bytes(op, args) / 4
