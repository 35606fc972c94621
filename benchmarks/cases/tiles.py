"""The tile lists of the Triton kernels as cases: every tile at several shapes, beside torch's own way.

The tiles that the kernels choose among come first, then others worth trying. `make gpu PART=tune` runs them. Where
another tile wins, it belongs in CONFIGS of memsave/ops/sampled_matmul/triton.py, or in the constants of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from memsave import ops
from tests.harness import assert_same, assert_within_budget

from .op_case import Contender, OpCase, in_fp64, sizes
from .op_inputs import (
    dense,
    entries_of_dense,
    gather,
    low_rank_block,
    masked_entries,
    matrices,
    product,
    rows_of,
    written_low_rank_block,
    written_product,
)
from .ops import BF16, FP32

# BLOCK_O, BLOCK_D, BLOCK_K, warps, stages
MORE_MATMUL_TILES = (
    (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (64, 256, 64, 8, 3),
    (128, 256, 32, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 32, 8, 4),
    (256, 128, 64, 8, 3),
)
# TILE_ELEMENTS, MAX_BLOCK_D
GATHER_TILES = ((4096, 1024), (2048, 512), (2048, 1024), (2048, 2048), (4096, 2048), (8192, 1024), (8192, 2048))
# BLOCK_ENTRIES, BLOCK_TOKENS, WARPS; and from which density on blocks of the product are made instead: never or always.
SDDMM_TILES = (
    (32, 128, 4),
    (16, 64, 1),
    (16, 128, 2),
    (16, 256, 4),
    (32, 64, 2),
    (32, 256, 8),
    (64, 64, 4),
    (64, 128, 8),
)
# BLOCK_N, BLOCK_F, BLOCK_R, warps, stages
MORE_MLP_TILES = (
    (16, 64, 64, 4, 2),
    (16, 64, 64, 8, 2),
    (32, 64, 64, 4, 3),
    (32, 64, 64, 8, 2),
    (64, 32, 32, 8, 2),
    (128, 32, 32, 8, 2),
    (128, 64, 64, 8, 2),
)
_mlp_sizes = sizes("N", "F", "R1", "R", "dtype", "activation", "gated")
_matmul_sizes, _gather_sizes = sizes("N", "D", "O", "dtype"), sizes("N", "D", "dtype")
_sddmm_sizes = sizes("N", "R", "C", "dtype", "density")


@contextmanager
def changed(module: ModuleType, **values: Any) -> Iterator[None]:
    """A module of memsave with other values for some of its names."""
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


@contextmanager
def without_tuning() -> Iterator[None]:
    """Deterministic mode, where kernels take the first tile of their list."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # filling takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextmanager
def matmul_tile(*tile: int) -> Iterator[None]:
    """`sampled_matmul` with one tile: the only one in the list."""
    triton = import_module("memsave.ops.sampled_matmul.triton")
    with changed(triton, CONFIGS={size: [triton._config(*tile)] for size in triton.CONFIGS}), without_tuning():
        yield


@contextmanager
def mlp_tile(*tile: int) -> Iterator[None]:
    """`low_rank_mlp` with one tile for every R."""
    triton = import_module("memsave.ops.low_rank_mlp.triton")
    only = {size: dict.fromkeys(lists, [triton._config(*tile)]) for size, lists in triton.CONFIGS.items()}
    with changed(triton, CONFIGS=only), without_tuning():
        yield


@contextmanager
def gather_tile(elements: int, max_block: int) -> Iterator[None]:
    """`gather_rows` with tiles of so many elements, and at most so many of them from one row."""
    triton = import_module("memsave.ops.gather_rows.triton")
    with changed(triton, TILE_ELEMENTS=elements, MAX_BLOCK_D=max_block):
        yield


@contextmanager
def sddmm_tile(entries: int, tokens: int, warps: int) -> Iterator[None]:
    """`sddmm` that sums entry by entry at any density, so many of them in a program, so many tokens at once."""
    triton = import_module("memsave.ops.sddmm.triton")
    tile = {"BLOCK_ENTRIES": entries, "BLOCK_TOKENS": tokens, "WARPS": warps}
    with changed(triton, DENSE_FROM=dict.fromkeys(triton.DENSE_FROM, 2.0), **tile):
        yield


@contextmanager
def sddmm_blocks() -> Iterator[None]:
    """`sddmm` that takes entries from blocks of the product at any density."""
    triton = import_module("memsave.ops.sddmm.triton")
    with changed(triton, DENSE_FROM=dict.fromkeys(triton.DENSE_FROM, 0.0)):
        yield


def _listed_tiles() -> list[tuple[int, ...]]:
    """The tiles that `sampled_matmul` chooses among, for any dtype."""
    if find_spec("triton") is None:
        return []
    configs = import_module("memsave.ops.sampled_matmul.triton").CONFIGS
    return [
        (c.kwargs["BLOCK_O"], c.kwargs["BLOCK_D"], c.kwargs["BLOCK_K"], c.num_warps, c.num_stages)
        for listed in configs.values()
        for c in listed
    ]


def _listed_mlp_tiles() -> list[tuple[int, ...]]:
    """The tiles that `low_rank_mlp` chooses among, for any dtype and R."""
    if find_spec("triton") is None:
        return []
    configs = import_module("memsave.ops.low_rank_mlp.triton").CONFIGS
    return [
        (*c.kwargs.values(), c.num_warps, c.num_stages)
        for lists in configs.values()
        for listed in lists.values()
        for c in listed
    ]


def _tiles(
    listed: list[tuple[int, ...]],
    more: tuple[tuple[int, ...], ...],
    within: Callable[..., AbstractContextManager[None]],
    call: Callable[..., Any],
) -> tuple[Contender, ...]:
    """A contender for each tile; the listed ones have a star."""
    return tuple(
        Contender(
            name=" x ".join(map(str, tile)) + (" *" if tile in listed else ""),
            call=call,
            within=partial(within, *tile),
            devices=("cuda",),
            may_fail=True,  # a tile may need more shared memory than there is
        )
        for tile in dict.fromkeys((*listed, *more))
    )


def gathered_product(dy: torch.Tensor, kept: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor, **_: Any) -> Any:
    """The rows of dy gathered by the kernel, then torch's own product."""
    return ops.gather_rows(dy, rows, scale).t() @ kept


def check_product(**inputs: Any) -> None:
    assert_within_budget(product(**inputs), written_product(**in_fp64(inputs)), written_product(**inputs))


def entries(a: torch.Tensor, b: torch.Tensor, indices: torch.Tensor, **_: Any) -> Any:
    return ops.sddmm(a, b, indices)


def check_entries(**inputs: Any) -> None:
    assert_within_budget(entries(**inputs), entries_of_dense(**in_fp64(inputs)), entries_of_dense(**inputs))


def block(**inputs: Any) -> Any:
    names = ("p_gate", "expand_gate", "bias_gate", "p_up", "expand_up", "bias_up", "reduce_down", "kind")
    return ops.low_rank_mlp(*map(inputs.get, names))  # type: ignore[arg-type]


def check_block(**inputs: Any) -> None:
    assert_within_budget(block(**inputs), written_low_rank_block(**in_fp64(inputs)), written_low_rank_block(**inputs))


def check_gather(**inputs: Any) -> None:
    assert_same(gather(**inputs), inputs["x"][inputs["rows"]])


def tile_cases() -> tuple[OpCase, ...]:
    """The cases; a function, because it reads the tile lists, which imports triton."""
    listed = _listed_tiles()
    return (
        OpCase(
            name="tiles_sampled_matmul",
            title="tiles (O x D x K x warps x stages; * is listed in the kernel) of sampled_matmul",
            devices=("cpu", "cuda"),
            expected_s=60.0,
            inputs=matrices,
            contenders=(
                Contender(name="dense dy.t() @ x", call=dense),
                Contender(name="gather_rows, then torch's product", call=gathered_product),
                Contender(name="tuned", call=product),
                *_tiles(listed, MORE_MATMUL_TILES, matmul_tile, product),
            ),
            check=check_product,
            sizes={
                "cuda": _matmul_sizes(
                    (16384, 2048, 8192, BF16),
                    (16384, 8192, 2048, BF16),
                    (16384, 2048, 2048, BF16),
                    (8192, 4096, 16, BF16),
                    (8192, 1024, 4096, FP32),
                )
            },
            tiny={"sizes": {device: _matmul_sizes((256, 32, 48, FP32)) for device in ("cpu", "cuda")}},
        ),
        OpCase(
            name="tiles_low_rank_mlp",
            title="tiles (N x F x R1 x warps x stages; * is listed in the kernel, for some R) of low_rank_mlp",
            devices=("cpu", "cuda"),
            expected_s=60.0,
            inputs=low_rank_block,
            contenders=(
                Contender(name="hidden activations of all rows", call=written_low_rank_block),
                Contender(name="plain PyTorch", call=block, within=ops.use_reference),
                Contender(name="tuned", call=block),
                *_tiles(_listed_mlp_tiles(), MORE_MLP_TILES, mlp_tile, block),
            ),
            check=check_block,
            sizes={
                "cuda": _mlp_sizes(
                    (4096, 8192, 819, 819, BF16, "silu", True),
                    (4096, 8192, 816, 816, BF16, "silu", True),
                    (4096, 8192, 512, 512, BF16, "silu", True),
                    (4096, 3072, 256, 256, BF16, "gelu", False),
                    (4096, 3072, 128, 128, BF16, "gelu", False),
                    (4096, 3072, 307, 307, FP32, "gelu", False),
                )
            },
            tiny={"sizes": {device: _mlp_sizes((256, 48, 12, 20, FP32, "silu", True)) for device in ("cpu", "cuda")}},
        ),
        OpCase(
            name="tiles_gather_rows",
            title="tiles (elements x most of one row; * is the kernel's) of gather_rows",
            devices=("cpu", "cuda"),
            inputs=rows_of,
            contenders=(
                Contender(name="indexing", call=lambda x, rows, **_: x[rows]),
                *_tiles([GATHER_TILES[0]], GATHER_TILES, gather_tile, gather),
            ),
            check=check_gather,
            sizes={
                "cuda": _gather_sizes(
                    (16384, 2048, BF16), (16384, 8192, BF16), (16384, 8192, FP32), (262144, 256, BF16)
                )
            },
            tiny={"sizes": {device: _gather_sizes((256, 32, FP32)) for device in ("cpu", "cuda")}},
        ),
        OpCase(
            name="tiles_sddmm",
            title="tiles (entries x tokens x warps; * is the kernel's) of sddmm, beside blocks of the product",
            devices=("cpu", "cuda"),
            inputs=masked_entries,
            contenders=(
                Contender(name="dense product, then its entries", call=entries_of_dense),
                Contender(name="blocks of the product", call=entries, within=sddmm_blocks, devices=("cuda",)),
                *_tiles([SDDMM_TILES[0]], SDDMM_TILES, sddmm_tile, entries),
            ),
            check=check_entries,
            sizes={
                "cuda": _sddmm_sizes(
                    *((8192, 4096, 4096, dtype, density) for dtype in (BF16, FP32) for density in (0.001, 0.01, 0.05)),
                    (16384, 14336, 4096, BF16, 0.005),
                )
            },
            tiny={"sizes": {device: _sddmm_sizes((256, 48, 32, FP32, 0.02)) for device in ("cpu", "cuda")}},
        ),
    )
