"""`pq_encode`, `pq_table`, `pq_select`, `pq_select_blocks`: values by hand, properties, refusals, mistakes. The case
tables have the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave import ops
from memsave.ops import _native
from tests.cases.ops import pq_encode, pq_select, pq_select_blocks, pq_table
from tests.cases.ops.inputs import generator
from tests.cases.ops.pq_select import limits, random_codes, random_table, sums
from tests.harness import OpCase, assert_same, check, implementation
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)
SELECT = settings(max_examples=60, deadline=None)


def integers(*values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_by_hand(backend: str) -> None:
    """Three subspaces of two features: two codes share a byte, the third has one for itself."""
    codebook = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]).expand(1, 3, 3, 2)
    x = torch.tensor([[3.0, 1.0, 0.0, 3.0, 0.1, 0.1], [0.0, 0.0, 1.0, 1.0, -1.0, 9.0]])[None, None]
    with ops.use_backend(backend):
        assert ops.pq_encode(x, codebook).tolist() == [[[[0x21, 0x00], [0x00, 0x02]]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_by_hand(backend: str) -> None:
    """Products 2, 4, 12 and 0, -5, -5: steps of 15 / 255 above the least of each subspace."""
    codebook = torch.tensor([[[1.0], [2.0], [6.0]], [[0.0], [5.0], [5.0]]])[None]
    with ops.use_backend(backend):
        table, step = ops.pq_table(torch.tensor([[[[2.0, -1.0]]]]), codebook)
    assert table[0, 0, 0].tolist() == [[0, 34, 170, *[0] * 13], [85, 0, 0, *[85] * 13]]
    assert step.tolist() == [[[torch.tensor(15.0).div(255).item()]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_by_hand(backend: str) -> None:
    """Sums 3, 5, 3, 0, 5, 3: of the equal ones the later keys."""
    table = torch.zeros(1, 1, 1, 1, 16, dtype=torch.uint8)
    table[..., :3] = integers(0, 3, 5, dtype=torch.uint8)
    codes = integers(1, 2, 1, 0, 2, 1, dtype=torch.uint8).view(1, 1, 1, 6)

    def keys(keep: int, mask: Tensor | None = None, causal: bool = False, window: int = 0, position: int = 0) -> Any:
        return ops.pq_select(table, codes, mask, causal, window, position, keep)[0, 0, 0].tolist()

    with ops.use_backend(backend):
        assert keys(1) == [4]
        assert keys(3) == [1, 4, 5]
        assert keys(4) == [1, 2, 4, 5]
        assert keys(8) == [0, 1, 2, 3, 4, 5, -1, -1]
        assert keys(2, causal=True, position=3) == [1, 2]
        assert keys(2, causal=True, window=2, position=3) == [2, 3]
        assert keys(2, causal=True, window=1, position=3) == [3, -1]
        assert keys(2, causal=True, position=-1) == [-1, -1]
        assert keys(2, mask=integers(1, 0, 0, 1, 0, 0, dtype=torch.bool).view(1, 1, 1, 6)) == [0, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_selection_of_blocks_by_hand(backend: str) -> None:
    """Eight keys in blocks of two, of weights 1, 1, 9, 0, 2, 2, 3, 4."""
    levels = [1, 1, 9, 0, 2, 2, 3, 4]
    table = torch.arange(16, dtype=torch.uint8).expand(1, 1, 4, 1, 1, 16)
    weights = torch.arange(256, dtype=torch.int32).expand(1, 1, 4, 1, 256)
    codes = integers(*levels, dtype=torch.uint8).view(1, 1, 1, 8)

    def blocks(keep: int, causal: bool, local: bool) -> Any:
        return ops.pq_select_blocks(table, weights, codes, None, causal, 0, 0, 2, keep, local)[0, 0].tolist()

    with ops.use_backend(backend):
        assert blocks(2, causal=False, local=False) == [[0, 1]] * 4  # the first always, then that of weight 9
        assert blocks(3, causal=False, local=False) == [[0, 1, 3]] * 4
        assert blocks(2, causal=False, local=True) == [[0, 1], [0, 1], [0, 2], [0, 3]]
        assert blocks(3, causal=True, local=True) == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3]]
        assert blocks(1, causal=True, local=True) == [[0], [1], [2], [3]]  # of the two, the later


def selections(draw: Callable[..., Any]) -> dict[str, Any]:
    """Settings of a small selection, with ties."""
    S = draw(st.integers(0, 40))
    return {
        **{"B": draw(st.integers(1, 2)), "H": draw(st.integers(1, 2)), "R": draw(st.integers(1, 7)), "S": S},
        **{"M": draw(st.integers(1, 5)), "levels": draw(st.integers(1, 9)), "keep": draw(st.integers(1, 45))},
        "mask": draw(st.sampled_from([None, *pq_select.MASKS.values()])),
        "is_causal": draw(st.booleans()),
        **{"window": draw(st.integers(0, 12)), "position": draw(st.integers(-9, 50))},
    }


@pytest.mark.parametrize("backend", BACKENDS)
@SELECT
@given(data=st.data())
def test_rows_get_their_best_visible_keys_once(backend: str, data: st.DataObject) -> None:
    args = pq_select.arguments(**data.draw(st.composite(selections)()))
    table, codes, mask, is_causal, window, position, keep = args
    found = implementation("pq_select", backend)(*args)
    keys, rows = codes.shape[3], table.shape[2]
    shown = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    shown = shown.expand(*table.shape[:3], keys)
    for b, h, r in ((b, h, r) for b in range(table.shape[0]) for h in range(table.shape[1]) for r in range(rows)):
        seen = [s for s in range(keys) if shown[b, h, r, s] and limits(position + r, is_causal, window, keys)[s]]
        taken = [s for s in found[b, h, r].tolist() if s != -1]
        assert taken == sorted(set(taken))  # ascending, none twice
        assert found[b, h, r].tolist() == taken + [-1] * (keep - len(taken))
        assert set(taken) <= set(seen)
        assert len(taken) == min(keep, len(seen))  # all of them where they are not more
        scores = sums(table[b, h], codes[b, h])[r]
        left = set(seen) - set(taken)
        if left and taken:  # no key left is better than one taken, or as good and later
            assert max((int(scores[s]), s) for s in left) < min((int(scores[s]), s) for s in taken)


@pytest.mark.parametrize("backend", BACKENDS)
@SELECT
@given(data=st.data())
def test_blocks_are_ascending_seen_and_with_the_first_and_their_own(backend: str, data: st.DataObject) -> None:
    drawn = data.draw(st.composite(selections)())
    drawn["N"], size, keep = drawn.pop("R"), data.draw(st.integers(1, 9)), drawn.pop("keep") % 9 + 1
    position, local = drawn["position"], data.draw(st.booleans())
    args = pq_select_blocks.arguments(**drawn, block_size=size, keep=keep, local=local)
    table, _, codes, mask, is_causal, window, *_ = args
    found = implementation("pq_select_blocks", backend)(*args)
    keys = codes.shape[3]
    shown = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask
    shown = shown.expand(*table.shape[:3], keys)
    for b, h, n in ((b, h, n) for b in range(table.shape[0]) for h in range(table.shape[1]) for n in range(drawn["N"])):
        first, last = position + n * size, position + (n + 1) * size - 1
        within = limits(first, is_causal, window, keys)
        own = {place // size for place in range(first, last + 1)} & set(range(-(-keys // size))) if local else set()
        counting = {s // size for s in range(keys) if shown[b, h, n, s] and within[s]}
        taken = [block for block in found[b, h, n].tolist() if block != -1]
        assert taken == sorted(set(taken))
        assert found[b, h, n].tolist() == taken + [-1] * (keep - len(taken))
        assert set(taken) <= counting | own
        assert len(taken) == min(keep, len(counting | own))
        if keep >= len(own):
            assert own <= set(taken)
        if keep > len(own - {0}) and 0 in counting:
            assert 0 in taken


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_entries_never_add_up_to_more_than_a_byte_holds(backend: str, data: st.DataObject) -> None:
    """Nor for numbers that round, of any size; and the estimate is off by less than a step for each subspace."""
    M, C, d = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 16)), data.draw(st.integers(1, 5))
    drawn = generator(data.draw(st.integers(0, 2**20)))
    query = torch.randn(1, 2, 9, M * d, generator=drawn) * 10.0 ** data.draw(st.integers(-9, 9))
    codebook = torch.randn(2, M, C, d, generator=drawn)
    table, step = implementation("pq_table", backend)(query, codebook)
    assert table.long().amax(-1).sum(-1).max() <= 255
    products = torch.einsum("bhrmd,hmcd->bhrmc", query.double().unflatten(-1, (M, d)), codebook.double())
    above = products - products.amin(-1, keepdim=True)
    estimates = table[..., :C].double() * step.double()[..., None, None]
    steps = (above - estimates) / step.double().clamp(min=1e-30)[..., None, None]
    assert steps.min() >= -1e-3 and steps.max() <= 1.001


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_codes_are_those_of_the_nearest_codewords(backend: str, data: st.DataObject) -> None:
    """For any numbers, up to what float32 cannot tell apart."""
    H, M, C, d = (data.draw(st.integers(1, most)) for most in (3, 9, 16, 6))
    drawn = generator(data.draw(st.integers(0, 2**20)))
    x, codebook = torch.randn(2, H, 7, M * d, generator=drawn), torch.randn(H, M, C, d, generator=drawn)
    codes = implementation("pq_encode", backend)(x, codebook)
    chosen = torch.stack([codes[:, :, m // 2] >> 4 * (m % 2) & 15 for m in range(M)], -1).long()  # (B, H, S, M)
    assert chosen.max() < C
    parts = x.double().unflatten(-1, (M, d))
    distances = (parts[..., None, :] - codebook.double()[None, :, None]).square().sum(-1)  # (B, H, S, M, C)
    assert (distances.gather(-1, chosen[..., None])[..., 0] - distances.amin(-1)).max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_behind_the_causal_limit_change_nothing(backend: str) -> None:
    args = pq_select.arguments(R=9, S=40, is_causal=True, position=11, keep=5)
    blocks = pq_select_blocks.arguments(N=5, S=40, is_causal=True, position=3, keep=3)
    with ops.use_backend(backend):
        found, of_blocks = ops.pq_select(*args), ops.pq_select_blocks(*blocks)
        args[1][..., 20:] ^= 255
        blocks[2][..., 20:] ^= 255
        assert_same(ops.pq_select(*args), found)
        assert_same(ops.pq_select_blocks(*blocks), of_blocks)
        args[1][..., 19:] ^= 255
        assert not torch.equal(ops.pq_select(*args), found)
    x, codebook = pq_encode.arguments(S=20)
    with ops.use_backend(backend):
        codes = ops.pq_encode(x, codebook)
        x[:, :, 11:] += 1
        assert_same(ops.pq_encode(x, codebook)[..., :11].contiguous(), codes[..., :11].contiguous())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_of_the_rows_gets_what_it_gets_in_the_whole(backend: str) -> None:
    args = pq_select.arguments(R=12, S=50, is_causal=True, window=20, position=7, mask=pq_select.some)
    table, codes, mask, *rest = args
    N, size = 6, 4
    of_blocks = pq_select_blocks.arguments(N=N, S=50, is_causal=True, position=7, mask=pq_select.some)
    with ops.use_backend(backend):
        whole = ops.pq_select(*args)
        part = ops.pq_select(table[:, :, 5:9], codes, mask[:, :, 5:9], True, 20, 7 + 5, rest[-1])
        assert_same(part, whole[:, :, 5:9].contiguous())
        blocks = ops.pq_select_blocks(*of_blocks)
        tables, weights, codes, mask, *_, keep, local = of_blocks
        later = tables[:, :, 2:], weights[:, :, 2:], codes, mask[:, :, 2:], True, 0, 7 + 2 * size, size, keep, local
        assert_same(ops.pq_select_blocks(*later), blocks[:, :, 2:].contiguous())


@pytest.mark.skipif("native" not in BACKENDS, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_threads_changes_no_bits(count: int) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("pq_encode", pq_encode.near_codewords(S=300)),
        ("pq_table", (torch.randn(2, 3, 70, 24, generator=generator(1)), torch.randn(3, 4, 16, 6))),
        ("pq_select", pq_select.arguments(R=70, S=90, is_causal=True, levels=3)),
        ("pq_select_blocks", pq_select_blocks.arguments(N=30, S=120, is_causal=True, levels=3)),
    ]
    for op, args in calls:
        launch = implementation(op, "native")
        with threads(1):
            expected = launch(*args)
        with threads(count):
            assert_same(launch(*args), expected, op)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_not_finite_still_give_codes(backend: str) -> None:
    """Which ones is not defined."""
    x, codebook = pq_encode.arguments(C=5, M=3)
    x.view(-1)[::7], x.view(-1)[1::9] = torch.nan, torch.inf
    codes = implementation("pq_encode", backend)(x, codebook)
    assert (codes & 15).max() < 5 and (codes >> 4).max() < 5


X, CODEBOOK = pq_encode.arguments(B=1, H=2, S=5, M=3, C=4, d=2)
TABLE, CODES = random_table(1, 2, 5, 3), random_codes(1, 2, 3, 9)
TABLES, WEIGHTS = random_table(1, 2, 5, 2, 3), pq_select_blocks.random_weights(1, 2, 5, 2)


@pytest.mark.parametrize("op", ["pq_encode", "pq_table"])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.int(), CODEBOOK), "{} must be a 4-D float16, bfloat16, float32 or float64 tensor; got torch.int32"),
        ((X[0], CODEBOOK), "{} must be a 4-D"),
        ((X, CODEBOOK.half()), "codebook must be a 4-D torch.float32"),
        ((X, CODEBOOK[0]), "codebook must be a 4-D"),
        ((X, CODEBOOK[:1]), r"codebook must be \(H, M, C, d\) with the H = 2 heads of {} and M \* d = 6"),
        ((X[..., :5], CODEBOOK), r"M \* d = 5, its head size; got \(2, 3, 4, 2\)"),
        ((X, CODEBOOK[:, :, :0]), r"1 to 16 codewords, .* got \(H, M, C, d\) = \(2, 3, 0, 2\)"),
        ((X, CODEBOOK.repeat(1, 1, 5, 1)), "1 to 16 codewords"),
        ((torch.ones(1, 2, 5, 65), torch.ones(2, 65, 4, 1)), "1 to 64 subspaces"),
        ((torch.ones(1, 2, 5, 0), torch.ones(2, 0, 4, 2)), "1 to 64 subspaces"),
        ((torch.ones(1, 2, 5, 129), torch.ones(2, 1, 4, 129)), "1 to 128 features"),
        ((torch.ones(1, 2, 5, 0), torch.ones(2, 3, 4, 0)), "1 to 128 features"),
        ((X, CODEBOOK.to("meta")), "one device; got {} on cpu, codebook on meta"),
    ],
)
def test_bad_keys_and_queries_are_refused(op: str, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message.format("x" if op == "pq_encode" else "query")):
        getattr(ops, op)(*args)


def a_mask(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": TABLE.int()}, "table must be a 5-D torch.uint8"),
        ({"table": TABLE[0]}, "table must be a 5-D"),
        ({"table": TABLE[..., :15]}, r"table must have \(M, 16\) as its last sizes, M from 1 to 64; got \(3, 15\)"),
        ({"table": random_table(1, 2, 5, 65)}, r"M from 1 to 64; got \(65, 16\)"),
        ({"table": TABLE[:, :, :, :0]}, r"got \(0, 16\)"),
        ({"codes": CODES.int()}, "codes must be a 4-D torch.uint8"),
        ({"codes": CODES[0]}, "codes must be a 4-D"),
        ({"codes": CODES[:, :1]}, r"codes must be \(B, H, P, S\) with \(B, H, P\) = \(1, 2, 2\); got \(1, 1, 2, 9\)"),
        ({"codes": CODES[:, :, :1]}, r"got \(1, 2, 1, 9\)"),
        ({"codes": CODES.expand(3, -1, -1, -1)}, r"got \(3, 2, 2, 9\)"),
        ({"keep": 0}, "keep must be at least 1 key for each row; got 0"),
        ({"keep": 2**31}, "keep must be"),
        ({"window": -1}, "window must be a number of keys, or 0 for no limit; got -1"),
        ({"mask": a_mask(1, 2, 5, 9).int()}, "mask must be a 4-D torch.bool"),
        ({"mask": a_mask(5, 9)}, "mask must be a 4-D"),
        ({"mask": a_mask(1, 2, 5, 8)}, r"mask must broadcast to \(1, 2, 5, 9\); got \(1, 2, 5, 8\)"),
        ({"mask": a_mask(2, 1, 1, 9)}, "mask must broadcast"),
        ({"mask": a_mask(1, 1, 5, 9).to("meta")}, "one device; got table on cpu, codes on cpu, mask on meta"),
        ({"codes": CODES.to("meta")}, "one device"),
    ],
)
def test_bad_selections_are_refused(changes: dict[str, Any], message: str) -> None:
    named = {"table": TABLE, "codes": CODES, "mask": None, "is_causal": False, "window": 0, "position": 0, "keep": 3}
    ops.pq_select(**named)
    with pytest.raises(ValueError, match=message):
        ops.pq_select(**{**named, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": TABLES.int()}, "table must be a 6-D torch.uint8"),
        ({"table": TABLE}, "table must be a 6-D"),
        ({"table": TABLES[..., :15]}, r"table must have \(M, 16\) as its last sizes"),
        ({"weights": WEIGHTS.long()}, "weights must be a 5-D torch.int32"),
        ({"weights": WEIGHTS[0]}, "weights must be a 5-D"),
        ({"weights": WEIGHTS[..., :255]}, r"weights must be \(1, 2, 5, 2, 256\), as table is; got \(1, 2, 5, 2, 255\)"),
        ({"weights": WEIGHTS[:, :, :4]}, r"weights must be .* got \(1, 2, 4, 2, 256\)"),
        ({"codes": CODES[:, :, :1]}, r"codes must be \(B, H, P, S\)"),
        ({"keep": 0}, "keep and the representatives of a block must be at least 1; got 0, 2"),
        ({"block_size": 0}, "block_size must be at least 1, and at most 65536; got 0"),
        ({"block_size": 2**45}, "block_size must be at least 1, and at most 65536; got 35184372088832"),
        ({"position": 2**62}, "position must be the number of a key"),
        ({"table": TABLES[:, :, :, :0], "weights": WEIGHTS[:, :, :, :0]}, "must be at least 1; got 3, 0"),
        ({"window": -2}, "window must be a number of keys, or 0 for no limit; got -2"),
        ({"mask": a_mask(1, 2, 5, 8)}, r"mask must broadcast to \(1, 2, 5, 9\)"),
        ({"mask": a_mask(1, 2, 5, 9).int()}, "mask must be a 4-D torch.bool"),
        ({"weights": WEIGHTS.to("meta")}, "one device; got table on cpu, weights on meta"),
    ],
)
def test_bad_selections_of_blocks_are_refused(changes: dict[str, Any], message: str) -> None:
    named = {
        **{"table": TABLES, "weights": WEIGHTS, "codes": CODES, "mask": None, "is_causal": False, "window": 0},
        **{"position": 0, "block_size": 4, "keep": 3, "local": True},
    }
    ops.pq_select_blocks(**named)
    with pytest.raises(ValueError, match=message):
        ops.pq_select_blocks(**{**named, **changes})


def test_an_input_that_requires_grad_is_refused() -> None:
    for op in (ops.pq_encode, ops.pq_table):
        with pytest.raises(RuntimeError, match="has no derivative"):
            op(X.clone().requires_grad_(), CODEBOOK)


def _earlier_of_equal_keys(*args: Any) -> Tensor:
    table, codes, mask, is_causal, window, position, keep = args
    turned = None if mask is None else mask.flip(-1)
    if is_causal or window or position:
        return pq_select.oracle(*args)
    found = pq_select.oracle(table, codes.flip(-1), turned, False, 0, 0, keep)
    found = torch.where(found < 0, codes.shape[3], codes.shape[3] - 1 - found).sort(-1).values
    return torch.where(found == codes.shape[3], -1, found).to(torch.int32)


def _later_of_equal_codewords(x: Tensor, codebook: Tensor) -> Tensor:
    last = codebook.shape[2] - 1
    codes = pq_encode.oracle(x, codebook.flip(2))
    low, high = last - (codes & 15), last - (codes >> 4)
    if codebook.shape[1] % 2:
        high[:, :, -1] = 0
    return low | high << 4


def _rounded_entries(query: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    _, step = pq_table.oracle(query, codebook)
    rows = query.float().unflatten(-1, (codebook.shape[1], codebook.shape[3]))
    products = torch.einsum("bhrmd,hmcd->bhrmc", rows, codebook)
    above = (products - products.amin(-1, keepdim=True)) / step.clamp(min=1e-30)[..., None, None]
    table = above.round().clamp(max=255).to(torch.uint8)
    return torch.cat((table, table[..., :1].expand(*table.shape[:-1], 16 - codebook.shape[2])), -1), step


def _select(**changes: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def run(table: Tensor, codes: Tensor, mask: Any, is_causal: bool, window: int, position: int, keep: int) -> Tensor:
        named = {"mask": mask, "is_causal": is_causal, "window": window, "position": position}
        named |= {name: change(named[name]) for name, change in changes.items()}
        return pq_select.oracle(table, codes, keep=keep, **named)

    return run


def _key_0_where_there_is_none(*args: Any) -> Tensor:
    return pq_select.oracle(*args).clamp(min=0)


def _select_blocks(**changes: Callable[[Any], Any]) -> Callable[..., Tensor]:
    order = "mask is_causal window position block_size keep local".split()

    def run(table: Tensor, weights: Tensor, codes: Tensor, *how: Any) -> Tensor:
        named = dict(zip(order, how, strict=True))
        named |= {name: change(named[name]) for name, change in changes.items()}
        return pq_select_blocks.oracle(table, weights, codes, **named)

    return run


def _one_representative(table: Tensor, weights: Tensor, *rest: Any) -> Tensor:
    return pq_select_blocks.oracle(table[:, :, :, :1], weights[:, :, :, :1], *rest)


def _first_row(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, :, :1]


MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "earlier_of_equal_keys": ("pq_select", _earlier_of_equal_keys),
    "window_one_longer": ("pq_select", _select(window=lambda n: n and n + 1)),
    "window_one_shorter": ("pq_select", _select(window=lambda n: n and max(1, n - 1))),
    "causal_one_further": ("pq_select", _select(position=lambda n: n + 1)),
    "position_forgotten": ("pq_select", _select(position=lambda n: 0)),
    "first_row_of_the_mask": ("pq_select", _select(mask=_first_row)),
    "mask_forgotten": ("pq_select", _select(mask=lambda mask: None)),
    "key_0_where_there_is_none": ("pq_select", _key_0_where_there_is_none),
    "later_of_equal_codewords": ("pq_encode", _later_of_equal_codewords),
    "halves_of_a_byte_swapped": ("pq_encode", lambda *args: (c := pq_encode.oracle(*args)) << 4 | c >> 4),
    "rounded_entries": ("pq_table", _rounded_entries),
    "not_local": ("pq_select_blocks", _select_blocks(local=lambda local: False)),
    "blocks_position_forgotten": ("pq_select_blocks", _select_blocks(position=lambda n: 0)),
    "blocks_window_one_longer": ("pq_select_blocks", _select_blocks(window=lambda n: n and n + 1)),
    "blocks_first_row_of_the_mask": ("pq_select_blocks", _select_blocks(mask=_first_row)),
    "one_representative": ("pq_select_blocks", _one_representative),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    op, wrong = MISTAKES[name]
    tables = {
        "pq_select": pq_select,
        "pq_encode": pq_encode,
        "pq_table": pq_table,
        "pq_select_blocks": pq_select_blocks,
    }
    cases: list[OpCase] = tables[op].CASES  # type: ignore[attr-defined]

    def is_right(case: OpCase) -> bool:
        try:
            check(case, wrong, deterministic=(False,))
        except AssertionError:
            return False
        return True

    assert not all(is_right(case) for case in cases if not case.large)
