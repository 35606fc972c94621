"""`selected_attention` and its backward: values by hand, gradients by autograd, refusals, mistakes. The case tables
have the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memsave import ops
from memsave.ops import _native
from tests.cases.ops import cases_of
from tests.cases.ops import selected_attention as forward
from tests.cases.ops.inputs import FLOATS, generator
from tests.cases.ops.pq_select import MASKS, some
from tests.harness import assert_same, assert_within_budget, check, implementation
from tests.ops.threads import threads

BACKENDS = ["reference"] + ["native"] * (_native.library() is not None)


def run(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    return implementation("selected_attention", backend)(*args)


def gradients(backend: str, doutput: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Those of query, key and value, by the op's own forward and backward."""
    query, key, value, indices, mask, *how = args
    output, logsumexp = run(backend, *args)
    sums = [torch.zeros(x.shape, dtype=logsumexp.dtype) for x in (key, value)]
    given = doutput, query, key, value, indices, mask, output, logsumexp, *sums, *how
    return implementation("selected_attention_backward", backend)(*given), *sums


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Two of four keys, of scores 0 and log 3: shares of 1/4 and 3/4. Then one key, and none."""
    query, key = torch.ones(1, 1, 3, 1), torch.tensor([9.0, 0.0, 8.0, math.log(3)]).view(1, 1, 4, 1)
    value = torch.tensor([7.0, 4.0, 7.0, 8.0]).view(1, 1, 4, 1)
    indices = torch.tensor([[[[1, 3], [2, -1], [-1, -1]]]], dtype=torch.int32)
    output, logsumexp = run(backend, query, key, value, indices, None, False, 0, 0, 1, 1.0)
    torch.testing.assert_close(output.flatten(), torch.tensor([7.0, 7.0, 0.0]))
    torch.testing.assert_close(logsumexp.flatten(), torch.tensor([math.log(4), 8.0, -math.inf]))
    dquery, dkey, dvalue = gradients(
        backend, torch.ones_like(output), query, key, value, indices, None, False, 0, 0, 1, 1.0
    )
    torch.testing.assert_close(dvalue.flatten(), torch.tensor([0.0, 0.25, 1.0, 0.75]))
    torch.testing.assert_close(dkey.flatten(), torch.tensor([0.0, -0.75, 0.0, 0.75]))  # p (v - output)
    torch.testing.assert_close(dquery.flatten(), torch.tensor([0.75 * math.log(3), 0.0, 0.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_all_keys_give_what_torch_gives(block_size: int, causal: bool, backend: str) -> None:
    query, key, value, *_ = forward.arguments(R=23, S=23, h=6, dtype=torch.float64)
    count = -(-23 // block_size)
    indices = torch.arange(count).expand(2, 2, count, count)
    if causal:
        indices = torch.where(indices <= torch.arange(count)[:, None], indices, -1)
    how = None, causal and block_size > 1, 0, 0, block_size, 0.3
    output, _ = run(backend, query, key, value, indices.to(torch.int32), *how)
    repeated = (x.repeat_interleave(3, 1) for x in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, is_causal=causal, scale=0.3)
    torch.testing.assert_close(output, expected)


def calls(draw: Callable[..., Any]) -> dict[str, Any]:
    """Settings of a small call."""
    size, groups = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    limited = size > 1
    return {
        **{"B": draw(st.integers(1, 2)), "kv": groups, "h": groups * draw(st.integers(1, 3))},
        **{"R": draw(st.integers(1, 20)), "S": draw(st.integers(1, 30)), "D": draw(st.integers(1, 9))},
        **{"E": draw(st.integers(1, 9)), "keep": draw(st.integers(1, 6)), "block_size": size},
        "mask": draw(st.sampled_from([None, *MASKS.values()])) if limited else None,
        "is_causal": limited and draw(st.booleans()),
        "window": draw(st.integers(0, 12)) if limited else 0,
        "position": draw(st.integers(-9, 30)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gradients_are_those_of_dense_attention(backend: str, data: st.DataObject) -> None:
    """In float64, by autograd through attention to all keys with a mask, for gradients of either sign."""
    args = forward.arguments(**data.draw(st.composite(calls)()), dtype=torch.float64, spread=1.0)
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    expected, expected_sum = forward.plain(*leaves, *args[3:])
    doutput = torch.randn(expected.shape, dtype=torch.float64, generator=generator(1))
    output, logsumexp = run(backend, *args)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(logsumexp, expected_sum)
    right = torch.autograd.grad(expected, leaves, doutput)
    for found, of in zip(gradients(backend, doutput, *args), right, strict=True):
        torch.testing.assert_close(found, of)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block_size", [1, 4])
def test_scores_of_thousands_do_not_overflow(block_size: int, dtype: torch.dtype, backend: str) -> None:
    """Products of a million are beyond float16, their exponentials beyond everything: one key of each row is left."""
    query, key, value, indices, *_ = forward.arguments(R=9, S=24, keep=4, block_size=block_size, dtype=dtype)
    query, key = (query * 1e3).to(dtype), (key * 1e3).to(dtype)
    args = query, key, value, indices, None, False, 0, 0, block_size, 1.0
    output, logsumexp = run(backend, *args)
    exact, _ = forward.oracle(*args)
    assert output.isfinite().all() and not logsumexp.isnan().any()
    torch.testing.assert_close(output.double(), exact, atol=0.1, rtol=0.01)
    for gradient in gradients(backend, torch.ones_like(output), *args):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_rows_that_see_nothing_give_zeros_everywhere(block_size: int, backend: str) -> None:
    args = list(forward.arguments(R=8, block_size=block_size))
    args[3] = torch.full_like(args[3], -1)
    output, logsumexp = run(backend, *args)
    assert not output.any() and (logsumexp == -math.inf).all()
    assert not any(gradient.any() for gradient in gradients(backend, torch.ones_like(output), *args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_what_is_not_chosen_is_not_read(block_size: int, backend: str) -> None:
    """NaN there changes nothing, but for the first block, which may stand in where a list has less."""
    args = forward.arguments(R=9, S=24, keep=3, block_size=block_size, fewer=False)
    query, key, value, indices, *rest = args
    lists, count = indices.shape[:3], 24 // block_size
    indices.copy_(forward.chosen_blocks((lists[0], lists[1], lists[2]), 3, count - 2, fewer=False) + 1)
    expected = run(backend, *args)
    chosen = torch.zeros(2, 2, 24 // block_size, dtype=torch.bool)
    chosen.scatter_(2, indices.flatten(2).long(), True)
    unread = ~chosen.repeat_interleave(block_size, 2)[..., None]
    assert unread.any()
    spoiled = (x.masked_fill(unread, math.nan) for x in (key, value))
    assert_same(run(backend, query, *spoiled, indices, *rest), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_behind_the_causal_limit_change_nothing(backend: str) -> None:
    args = forward.arguments(R=16, S=24, keep=6, block_size=4, is_causal=True, position=2, fewer=False)
    query, key, value, *rest = args
    expected = run(backend, *args)
    for x in (key, value):
        x[:, :, 18:] += 100
    assert_same(run(backend, *args), expected)
    key[:, :, 17:] += 100
    changed, _ = run(backend, *args)
    assert_same(changed[:, :, :15].contiguous(), expected[0][:, :, :15].contiguous())
    assert not torch.equal(changed[:, :, 15], expected[0][:, :, 15])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 4])
def test_queries_may_come_in_parts(block_size: int, backend: str) -> None:
    """Gradients of keys and values add up over them."""
    settings = {"mask": some, "is_causal": True, "window": 15} if block_size > 1 else {}
    args = forward.arguments(R=20, S=24, keep=5, block_size=block_size, dtype=torch.float64, position=4, **settings)
    query, key, value, indices, mask, is_causal, window, position, size, scale = args
    doutput = torch.randn(query.shape, dtype=torch.float64, generator=generator(2))
    output, logsumexp = run(backend, *args)
    expected = gradients(backend, doutput, *args)
    sums, parts = [torch.zeros_like(key), torch.zeros_like(value)], []
    for start in (0, 8):
        rows = slice(start, 8 if start == 0 else 20)
        blocks = slice(start // size, -(-rows.stop // size))
        of_part = indices[:, :, blocks], None if mask is None else mask[:, :, rows]
        how = is_causal, window, position + start, size, scale
        part, part_sum = run(backend, query[:, :, rows], key, value, *of_part, *how)
        torch.testing.assert_close(part, output[:, :, rows])
        given = doutput[:, :, rows], query[:, :, rows], key, value, *of_part, part, part_sum, *sums, *how
        parts.append(implementation("selected_attention_backward", backend)(*given))
        assert logsumexp[:, :, rows].shape == part_sum.shape
    for found, right in zip((torch.cat(parts, 2), *sums), expected, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.skipif("native" not in BACKENDS, reason=f"no C++ kernels: {_native.state()}")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_number_of_threads_changes_no_bits(dtype: torch.dtype) -> None:
    args = forward.arguments(R=150, S=160, h=6, keep=9, dtype=dtype)
    doutput = torch.randn(args[0].shape, generator=generator(3)).to(dtype)
    with threads(1):
        expected = (*run("native", *args), *gradients("native", doutput, *args))
    for count in (2, 3):
        with threads(count):
            assert_same((*run("native", *args), *gradients("native", doutput, *args)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    """Far closer to float64 than attention in that precision."""
    args = forward.arguments(R=64, S=96, keep=40, D=64, dtype=dtype, fewer=False, spread=1.0)
    exact, exact_sum = forward.oracle(*args)
    output, logsumexp = run(backend, *args)
    assert_within_budget(output, exact, exact.to(dtype))
    assert (logsumexp.double() - exact_sum).abs().max() < 1e-5


Q, K, V, INDICES, *_ = forward.arguments(B=1, h=4, kv=2, R=6, S=8, D=3, E=5, block_size=2)
NAMED = {
    **{"query": Q, "key": K, "value": V, "indices": INDICES, "mask": None, "is_causal": False, "window": 0},
    **{"position": 0, "block_size": 2, "scale": 1.0},
}
SINGLE = {"block_size": 1, "indices": INDICES.repeat(1, 1, 2, 1)}
MASK = torch.ones(1, 2, 6, 8, dtype=torch.bool)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"query": Q.int()}, "query must be a 4-D float16, bfloat16, float32 or float64 tensor; got torch.int32"),
    ({"query": Q[0]}, "query must be a 4-D"),
    ({"key": K.half()}, "key must be a 4-D torch.float32"),
    ({"key": K[0]}, "key must be a 4-D"),
    ({"value": V.double()}, "value must be a 4-D torch.float32"),
    ({"indices": INDICES.long()}, "indices must be a 4-D torch.int32"),
    ({"key": K.expand(2, -1, -1, -1)}, r"key must be \(B, kv, S, D\) with B = 1, D = 3 and h = 4 a multiple of kv"),
    ({"key": K[..., :2]}, r"D = 3 .* got \(1, 2, 8, 2\)"),
    ({"key": K[:, :0]}, r"a multiple of kv; got \(1, 0, 8, 3\)"),
    ({"query": Q[:, :3]}, "h = 3 a multiple of kv"),
    ({"value": V[:, :, :7]}, r"value must be \(B, kv, S, E\) with the sizes of key, \(1, 2, 8\); got \(1, 2, 7, 5\)"),
    ({"value": V[:, :1]}, "value must be"),
    ({"block_size": 0}, "block_size must be at least 1, and at most 65536; got 0"),
    ({"block_size": 3}, r"indices must be \(B, kv, N, K\) with \(B, kv, N\) = \(1, 2, 2\); got \(1, 2, 3, 3\)"),
    ({"indices": INDICES[:, :1]}, r"indices must be .* got \(1, 1, 3, 3\)"),
    ({"mask": MASK, **SINGLE}, "mask, is_causal and window are for blocks"),
    ({"is_causal": True, **SINGLE}, "mask, is_causal and window are for blocks"),
    ({"window": 2, **SINGLE}, "mask, is_causal and window are for blocks"),
    ({"window": -1}, "window must be a number of keys, or 0 for no limit; got -1"),
    ({"mask": MASK.float()}, "mask must be a 4-D torch.bool"),
    ({"mask": MASK[0]}, "mask must be a 4-D"),
    ({"mask": MASK.repeat(1, 2, 1, 1)}, r"mask must broadcast to \(1, 2, 6, 8\); got \(1, 4, 6, 8\)"),
    ({"mask": MASK[..., :7]}, "mask must broadcast"),
    ({"indices": INDICES.to("meta")}, "one device; got query on cpu, .*indices on meta"),
    ({"mask": MASK.to("meta")}, "one device"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.selected_attention(**{**NAMED, **changes})


def named_gradients() -> dict[str, Any]:
    output, logsumexp = ops.selected_attention(**NAMED)
    sums = {"dkey": torch.zeros_like(K), "dvalue": torch.zeros_like(V)}
    return {**NAMED, "doutput": output, "output": output, "logsumexp": logsumexp, **sums}


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_bad_input_of_the_backward_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.selected_attention_backward(**{**named_gradients(), **changes})


def gaps(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("doutput", lambda x: x.half(), "doutput must be a 4-D torch.float32"),
        ("doutput", lambda x: x[0], "doutput must be a 4-D"),
        ("doutput", lambda x: x[..., :4], r"doutput must be \(B, h, R, E\) = \(1, 4, 6, 5\); got \(1, 4, 6, 4\)"),
        ("output", lambda x: x.double(), "output must be a 4-D torch.float32"),
        ("output", lambda x: x[:, :, :5], r"output must be \(B, h, R, E\) = \(1, 4, 6, 5\); got \(1, 4, 5, 5\)"),
        ("logsumexp", lambda x: x.double(), "logsumexp must be a 3-D torch.float32"),
        ("logsumexp", lambda x: x[0], "logsumexp must be a 3-D"),
        ("logsumexp", lambda x: x[:, :2], r"logsumexp must be \(B, h, R\) = \(1, 4, 6\); got \(1, 2, 6\)"),
        ("dkey", lambda x: x.half(), "dkey must be a 4-D torch.float32"),
        ("dkey", lambda x: x[:, :1], r"dkey must be contiguous, of shape \(1, 2, 8, 3\); got \(1, 1, 8, 3\)"),
        ("dkey", gaps, "dkey must be contiguous"),
        ("dvalue", lambda x: x.double(), "dvalue must be a 4-D torch.float32"),
        ("dvalue", lambda x: x[..., :3], r"dvalue must be contiguous, of shape \(1, 2, 8, 5\)"),
        ("dvalue", gaps, "dvalue must be contiguous"),
        ("doutput", lambda x: x.to("meta"), "one device"),
        ("dkey", lambda x: x.to("meta"), "one device"),
    ],
)
def test_bad_gradients_are_refused(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    named = named_gradients()
    with pytest.raises(ValueError, match=message):
        ops.selected_attention_backward(**{**named, name: change(named[name])})


def test_an_input_that_requires_grad_is_refused() -> None:
    with pytest.raises(RuntimeError, match="has no derivative"):
        ops.selected_attention(**{**NAMED, "value": V.clone().requires_grad_()})


def _changed(**changes: Callable[[Any], Any]) -> Callable[..., Any]:
    """The right thing for other arguments."""
    order = "query key value indices mask is_causal window position block_size scale".split()

    def attend(*args: Any) -> Any:
        named = dict(zip(order, args, strict=True))
        named |= {name: change(named[name]) for name, change in changes.items()}
        return implementation("selected_attention", "reference")(*named.values())

    return attend


def _first_row(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[:, :, :1]


def _of_the_next_head(x: Tensor) -> Tensor:
    return x.roll(1, 1)


def _interleaved_heads(query: Tensor, key: Tensor, *rest: Any) -> Any:
    """Query head i reads key/value head i % kv."""
    groups = key.shape[1]
    order = torch.arange(query.shape[1]).view(-1, groups).t().flatten()
    output, logsumexp = implementation("selected_attention", "reference")(query[:, order], key, *rest)
    back = order.argsort()
    return output[:, back].contiguous(), logsumexp[:, back].contiguous()


def _no_peak(*args: Any) -> Any:
    """Log-sum-exp of scores in the dtype of the inputs, without the largest taken off."""
    output, logsumexp = forward.oracle(*args)
    overflow = logsumexp > math.log(torch.finfo(args[0].dtype).max)
    return output.to(args[0].dtype), logsumexp.masked_fill(overflow, math.inf).to(
        torch.promote_types(args[0].dtype, torch.float32)
    )


def _key_0_for_none(*args: Any) -> Any:
    return _changed(indices=lambda indices: indices.clamp(min=0))(*args)


def _last_block_forgotten(indices: Tensor) -> Tensor:
    return torch.where(torch.arange(indices.shape[-1]) == indices.shape[-1] - 1, -1, indices)


Gradients = Callable[..., Tensor]
_REFERENCE: Gradients = implementation("selected_attention_backward", "reference")


def _without_delta(doutput: Tensor, query: Tensor, *rest: Any) -> Tensor:
    *tensors, output = rest[:5]
    return _REFERENCE(doutput, query, *tensors, torch.zeros_like(output), *rest[5:])


def _delta_not_negative(*args: Any) -> Tensor:
    """Products with the output clamped at zero."""
    doutput, *tensors = args[:6]
    output, *rest = args[6:]
    positive = ((doutput * output).sum(-1, keepdim=True) >= 0).to(output.dtype)
    return _REFERENCE(doutput, *tensors, output * positive, *rest)


def _dkey_overwritten(*args: Any) -> Tensor:
    args[8].zero_()
    return _REFERENCE(*args)


def _dvalue_of_one_head(*args: Any) -> Tensor:
    """Of the query heads of a group only the first counts."""
    doutput, query, key = args[:3]
    repeats = max(1, query.shape[1] // max(1, key.shape[1]))
    first = (torch.arange(query.shape[1]) % repeats == 0).view(-1, 1, 1).to(doutput.dtype)
    dvalue = args[9].clone()
    dquery = _REFERENCE(*args)
    _REFERENCE(doutput * first, *args[1:8], torch.zeros_like(args[8]), dvalue, *args[10:])
    args[9].copy_(dvalue)
    return dquery


def _scale_forgotten(*args: Any) -> Tensor:
    dquery = _REFERENCE(*args)
    return dquery / args[-1] if dquery.numel() else dquery


MISTAKES: dict[str, tuple[str, Callable[..., Any]]] = {
    "window_one_longer": ("selected_attention", _changed(window=lambda n: n and n + 1)),
    "causal_one_further": ("selected_attention", _changed(position=lambda n: n + 1)),
    "position_forgotten": ("selected_attention", _changed(position=lambda n: 0)),
    "first_row_of_the_mask": ("selected_attention", _changed(mask=_first_row)),
    "mask_forgotten": ("selected_attention", _changed(mask=lambda mask: None)),
    "key_of_another_head": ("selected_attention", _changed(key=_of_the_next_head)),
    "list_of_another_head": ("selected_attention", _changed(indices=_of_the_next_head)),
    "interleaved_heads": ("selected_attention", _interleaved_heads),
    "scale_forgotten": ("selected_attention", _changed(scale=lambda scale: 1.0)),
    "no_peak": ("selected_attention", _no_peak),
    "key_0_for_none": ("selected_attention", _key_0_for_none),
    "last_block_forgotten": ("selected_attention", _changed(indices=_last_block_forgotten)),
    "without_delta": ("selected_attention_backward", _without_delta),
    "delta_not_negative": ("selected_attention_backward", _delta_not_negative),
    "dkey_overwritten": ("selected_attention_backward", _dkey_overwritten),
    "dvalue_of_one_head": ("selected_attention_backward", _dvalue_of_one_head),
    "scale_of_the_gradient_forgotten": ("selected_attention_backward", _scale_forgotten),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str) -> None:
    op, wrong = MISTAKES[name]
    for case in cases_of(op, large=False):
        try:
            check(case, wrong, deterministic=(False,))
        except AssertionError as error:
            assert "against float64, the budget is" in str(error)
            return
    raise AssertionError("no row notices it")
