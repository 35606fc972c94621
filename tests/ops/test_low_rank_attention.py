"""`low_rank_attention`: values by hand, refusals, equal results, bounded memory. The case table has the rest."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memsave import ops
from memsave.ops.low_rank_attention.plan import accumulates_in_rank_space, plan
from memsave.ops.low_rank_attention.sizes import sizes
from memsave.ops.low_rank_attention.tiles import slice_keys, tile_of
from tests.cases.ops import cases_of
from tests.cases.ops import low_rank_attention as rows
from tests.cases.ops.inputs import FLOATS
from tests.harness import assert_same, assert_within_budget, implementation
from tests.ops.allocations import peak_inside_bytes

ARGUMENTS = rows.arguments(B=2, T=3, S=5, norm=True, mask=rows.some)
NAMES = ("query", "key_latent", "key_factor", "key_bias", "value_latent", "value_factor", "value_bias", "scale")
NAMES += ("cos", "sin", "norm_weight", "norm_eps", "mask", "is_causal")


def test_by_hand() -> None:
    """Two keys of size 2 from latents of rank 1; the scores differ by log 3."""
    query = torch.tensor([[[[1.0, 0.0]]]])
    latent = torch.tensor([[[0.0], [1.0]]])
    key_factor, value_factor = torch.tensor([[3.0], [7.0]]).log(), torch.tensor([[4.0], [8.0]])
    bias = torch.tensor([10.0, 20.0])
    out = ops.low_rank_attention(query, latent, key_factor, bias, latent, value_factor, bias, scale=1.0)
    torch.testing.assert_close(out, torch.tensor([[[[13.0, 26.0]]]]))
    mask = torch.tensor([False, False])
    out = ops.low_rank_attention(query, latent, key_factor, bias, latent, value_factor, bias, scale=1.0, mask=mask)
    assert out.tolist() == [[[[0.0, 0.0]]]]


def test_rotation_by_hand() -> None:
    """A quarter turn takes (a, b) to (-b, a); the second key alone is turned."""
    query, latent = torch.tensor([[[[0.0, 1.0]]]]), torch.ones(1, 2, 1)
    cos, sin = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    factor = torch.tensor([[3.0], [0.0]]).log().nan_to_num(neginf=0.0)
    values = torch.tensor([[[0.0], [1.0]]])
    out = ops.low_rank_attention(query, latent, factor, None, values, torch.ones(2, 1), None, 1.0, cos, sin)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 0.75))


def with_argument(**changes: Any) -> dict[str, Any]:
    return dict(zip(NAMES, ARGUMENTS, strict=True)) | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ARGUMENTS[0].int()}, "query must be a 4-D float16"),
        ({"query": ARGUMENTS[0][0]}, "query must be a 4-D"),
        ({"query": ARGUMENTS[0][:, :3]}, "the 3 heads of query are a multiple of kv; got 32 rows"),
        ({"query": ARGUMENTS[0][..., :0]}, "D is the last size of query, 0"),
        ({"key_latent": ARGUMENTS[1].half()}, "key_latent must be a 3-D torch.float32"),
        ({"key_latent": ARGUMENTS[1][:1]}, "key_latent must have one entry for each of the 2 sequences"),
        ({"key_latent": ARGUMENTS[1][:, :4]}, "key_latent and value_latent must have as many keys"),
        (
            {"key_factor": ARGUMENTS[2][:, 1:]},
            r"must have one rank as their last size; got \(2, 5, 11\) and \(32, 10\)",
        ),
        ({"key_factor": ARGUMENTS[2][:31], "key_bias": None}, "key_factor must have kv . D rows"),
        ({"key_bias": ARGUMENTS[3][1:]}, "key_bias must have one entry for each of the 32 rows of key_factor"),
        ({"value_latent": ARGUMENTS[4][..., 1:]}, "value_latent and value_factor must have one rank"),
        (
            {"value_factor": ARGUMENTS[5][:16], "value_bias": None},
            "value_factor must have one entry for each of the 32",
        ),
        ({"cos": None}, "cos and sin must be given together; got no cos"),
        (
            {"sin": ARGUMENTS[9][:, 1:]},
            r"sin must have the shape \(B or 1, S, D\) = \(2 or 1, 5, 16\); got \(1, 4, 16\)",
        ),
        ({"cos": ARGUMENTS[8].expand(3, -1, -1)}, "cos must have the shape"),
        ({"norm_weight": ARGUMENTS[10][1:]}, "norm_weight must have one entry for each of the 16 features of a head"),
        ({"mask": ARGUMENTS[12].int()}, "mask must be bool or have the dtype of query"),
        (
            {"mask": ARGUMENTS[12][..., 1:]},
            r"mask must broadcast to \(B, h, T, S\) = \(2, 4, 3, 5\); got \(2, 1, 3, 4\)",
        ),
        ({"mask": ARGUMENTS[12][None]}, "mask must broadcast"),
        ({"mask": ARGUMENTS[12].to("meta")}, "one device; got query on cpu"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.low_rank_attention(**with_argument(**changes))


def test_rotated_heads_of_odd_size_are_refused() -> None:
    args = rows.arguments(D=7, turned=False)
    with pytest.raises(ValueError, match="even size; got D = 7"):
        ops.low_rank_attention(*args[:8], cos=torch.ones(1, 33, 7), sin=torch.ones(1, 33, 7))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["token", "prompt", "masks", "spread", "several_tiles", "none"])
def test_declared_bytes_are_those_that_the_profiler_sees(name: str, dtype: torch.dtype) -> None:
    args = {
        "token": lambda: rows.arguments(h=8, kv=4, D=64, S=900, Rk=77, Rv=79, dtype=dtype),
        "prompt": lambda: rows.arguments(T=60, S=90, Rv=120, norm=True, turned=False, is_causal=True, dtype=dtype),
        "masks": lambda: rows.arguments(B=2, T=7, mask=rows.added, biases=False, dtype=dtype),
        "spread": lambda: rows.spread(B=2, T=20, Rv=120, norm=True, mask=rows.with_mask_of_heads, dtype=dtype),
        "several_tiles": lambda: rows.arguments(h=8, T=300, S=600, mask=rows.some, is_causal=True, dtype=dtype),
        "none": lambda: rows.arguments(S=0, dtype=dtype),
    }[name]()
    with ops.use_reference():
        seen = peak_inside_bytes(lambda: ops.low_rank_attention(*args))
        declared = ops.workspace_bytes("low_rank_attention", args)
    assert abs(declared - seen) <= 64, f"declared {declared}, seen {seen}"


@pytest.mark.parametrize("keys", [512, 16384, 131072])
def test_memory_of_a_token_is_bounded(keys: int) -> None:
    """All keys alone would have 2 KiB for each of the tokens."""
    with ops.use_reference(), FakeTensorMode():
        factor, latent, angle = torch.empty(512, 205), torch.empty(1, keys, 205), torch.empty(1, keys, 64)
        args = (torch.empty(1, 32, 1, 64), latent, factor, None, latent, factor, None, 0.125, angle, angle)
        assert 2**20 <= ops.workspace_bytes("low_rank_attention", (*args, None, 1e-6, None, False)) <= 4 * 2**20


class Products(TorchDispatchMode):
    """Counts the rows of latents that products with a factor take."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.rows += args[1].shape[1] if args[0].shape[0] == 32 else args[0].shape[0]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("queries", "rebuilt"), [(1, 1100), (300, 2200)])
def test_each_key_and_value_is_rebuilt_once(queries: int, rebuilt: int) -> None:
    """Over several tiles of both keys and queries; values only where that is cheaper than rank space."""
    args = rows.arguments(h=8, T=queries, S=1100, Rv=60)
    cut = plan(args[0], args[1], args[2], args[4])
    assert cut.keys < 1100 and (cut.queries < queries or queries == 1)
    with Products() as products:
        implementation("low_rank_attention", "reference")(*args)
    assert products.rows == rebuilt


@pytest.mark.parametrize("in_rank_space", [True, False])
def test_both_ways_to_accumulate_give_the_same(in_rank_space: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = import_module("memsave.ops.low_rank_attention.plan")
    monkeypatch.setattr(plans, "accumulates_in_rank_space", lambda size: in_rank_space)
    args = rows.arguments(B=2, T=9, S=40, Rv=23, is_causal=True)
    with ops.use_reference():
        assert_within_budget(ops.low_rank_attention(*args), rows.oracle(*args), rows.plain(*args))


def test_rows_take_every_way() -> None:
    """Rank space and rebuilt values, one tile and several, in plain PyTorch; the same and slices in the kernels."""
    plain, kernel = set(), set()
    for case in cases_of("low_rank_attention"):
        query, key_latent, key_factor, _, value_latent, *_ = case.make()
        size = sizes(query, key_latent, key_factor, value_latent)
        if min(size) > 0:
            cut, tile = plan(query, key_latent, key_factor, value_latent), tile_of(size, query.dtype)
            plain.add((accumulates_in_rank_space(size), cut.keys < size.S, cut.queries < size.T))
            kernel.add((tile.in_rank_space, slice_keys(size, tile) < size.S))
    assert plain >= {(True, False, False), (True, True, False), (False, False, False), (False, True, True)}
    assert kernel == {(a, b) for a in (True, False) for b in (True, False)}


def test_slices_are_whole_tiles_and_cover_all_keys() -> None:
    for keys in (1, 33, 511, 512, 700, 4096, 16384):
        size = sizes(torch.empty(1, 32, 1, 64), torch.empty(1, keys, 9), torch.empty(512, 9), torch.empty(1, keys, 9))
        tile = tile_of(size, torch.float16, 32)
        length = slice_keys(size, tile)
        assert length % tile.block_n == 0 and (keys < 512) == (length >= keys)
        assert keys < 4096 or 8 * -(-keys // length) >= 8 * 16


def test_the_public_function_takes_the_rest_by_name() -> None:
    names = dict(zip(NAMES, ARGUMENTS, strict=True))
    tensors: list[Tensor] = [names.pop(name) for name in NAMES[:7]]
    assert_same(ops.low_rank_attention(*tensors, **names), ops.low_rank_attention(*ARGUMENTS))
