"""Attention to chosen keys: all of them is torch's attention; some of them is dense attention under a mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import memsave
from memsave import ops
from memsave.nn.sparse_attention import function, selecting
from memsave.nn.sparse_attention.function import attend, kept_bytes
from memsave.nn.sparse_attention.selecting import Choice, Visibility

from .toys import SIZE, Case, choice, chosen, codebook, dense, gradients, inputs, sight, visible

GRANULARITIES = ["token", "block"]
by_granularity = pytest.mark.parametrize("granularity", GRANULARITIES)
CASES = {
    "plain": Case(67, 67),
    "causal": Case(83, 83, is_causal=True),
    "causal_all_heads": Case(71, 71, groups=4, is_causal=True),
    "one_group": Case(71, 71, groups=1, is_causal=True),
    "window": Case(90, 90, is_causal=True, window=37),
    "narrow_window": Case(75, 75, is_causal=True, window=3),
    "left_padding": Case(90, 90, mask="left", is_causal=True),
    "right_padding": Case(90, 90, mask="right", is_causal=True, window=41),
    "encoder_padding": Case(77, 77, mask="right"),
    "full_mask": Case(85, 85, mask="full"),
    "mask_by_head": Case(70, 70, mask="heads", is_causal=True),
    "more_keys": Case(21, 93, is_causal=True),
    "one_query": Case(1, 77, window=50),
    "cross": Case(35, 94),
    "cross_padding": Case(83, 70, mask="right"),
    "other_values": Case(66, 66, is_causal=True, values=5),
}


@by_granularity
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 15, 53])
def test_all_keys_is_torchs_attention(granularity: str, groups: int, is_causal: bool, length: int) -> None:
    """For any codebook, here one that says nothing, and one of random numbers; forward and backward."""
    case = Case(length, length, groups=groups, is_causal=is_causal)
    *tensors, upstream = inputs(case)
    expected = F.scaled_dot_product_attention(*tensors, is_causal=is_causal, enable_gqa=True)
    wanted = gradients(expected, tensors, upstream)
    for words in (torch.zeros(groups, 2, 16, 4), 100 * codebook(case)):
        y = attend(*tensors, words, choice(granularity, 1.0), sight(case))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
        for mine, theirs in zip(gradients(y, tensors, upstream), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@by_granularity
@pytest.mark.parametrize("keep", [1.0, 3])
def test_gradcheck(granularity: str, keep: float | int) -> None:
    """The choice does not change under the small steps that it takes."""
    case = Case(19, 19, batch=1, heads=2, groups=1, features=2, values=3, is_causal=True)
    *tensors, _ = inputs(case)
    words = codebook(case)
    assert torch.autograd.gradcheck(lambda *t: attend(*t, words, choice(granularity, keep), sight(case)), tensors)


@by_granularity
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_bytes", [1, 2**30])
def test_chosen_keys_as_a_mask(granularity: str, name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients, for all queries at once and for a block of them at a time."""
    monkeypatch.setattr(selecting, "CHUNK_BYTES", chunk_bytes)
    case, how = CASES[name], choice(granularity)
    *tensors, upstream = inputs(case)
    words, see = codebook(case), sight(case)
    y = attend(*tensors, words, how, see)
    allowed = chosen(tensors[0], tensors[1], words, how, see, case.features**-0.5) & visible(case, see)
    left_out = visible(case, see) & ~allowed
    assert left_out.any() or name in ("narrow_window",), "the case leaves nothing out"
    expected = dense(*tensors, allowed)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    found = gradients(y, tensors, upstream)
    for mine, theirs in zip(found, gradients(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@by_granularity
@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_the_scale_is_that_of_the_scores_and_of_the_choice(granularity: str, scale: float) -> None:
    case, how = CASES["causal"], choice(granularity)
    *tensors, _ = inputs(case)
    words, see = codebook(case), sight(case)
    lists = [chosen(tensors[0], tensors[1], words, how, see, s) for s in (scale, -scale)]
    assert not torch.equal(*lists)
    expected = dense(*tensors, lists[0] & visible(case, see), scale)
    torch.testing.assert_close(attend(*tensors, words, how, see, scale), expected, rtol=1e-12, atol=1e-13)


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_round_no_worse_than_dense_attention(granularity: str, dtype: torch.dtype) -> None:
    """Twice the error of the same attention by matrices in that dtype; the lists are those of the rounded tensors."""
    case, how = CASES["causal"], choice(granularity)
    *rounded, upstream = inputs(case, dtype)
    words, see = codebook(case), sight(case)
    allowed = chosen(rounded[0], rounded[1], words, how, see, case.features**-0.5) & visible(case, see)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    right = dense(*exact, allowed)
    right_all = [right, *gradients(right, exact, upstream)]
    plain = dense(*rounded, allowed)
    plain_all = [plain, *gradients(plain, rounded, upstream)]
    y = attend(*rounded, words, how, see)
    for mine, theirs, true in zip([y, *gradients(y, rounded, upstream)], plain_all, right_all, strict=True):
        assert mine.dtype == dtype and (mine - true).norm() <= 2 * (theirs - true).norm()


@by_granularity
def test_autocast_computes_in_its_dtype(granularity: str) -> None:
    case, how = CASES["causal"], choice(granularity)
    *tensors, upstream = inputs(case, torch.float32)
    words, see = codebook(case), sight(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = attend(*tensors, words, how, see)
        kept = memsave.saved_bytes(lambda: attend(*tensors, words, how, see))
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors]
    expected = attend(*narrow, words, how, see)
    assert torch.equal(y, expected) and y.dtype == torch.bfloat16
    shapes = [tuple(t.shape) for t in tensors]
    assert kept == words.nbytes + kept_bytes(*shapes, torch.bfloat16)  # type: ignore[arg-type]
    found = gradients(y, tensors, upstream)
    for mine, theirs in zip(found, gradients(expected, narrow, upstream), strict=True):
        assert mine.dtype == torch.float32 and torch.equal(mine, theirs.float())


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_stay_finite(granularity: str, dtype: torch.dtype) -> None:
    """Products beyond the range of fp16, which has 65504 as its largest number."""
    case, how = CASES["causal"], choice(granularity)
    *tensors, upstream = inputs(case, dtype)
    big = [(200 * t.detach()).requires_grad_() for t in tensors[:2]]
    assert (big[0].double() @ big[1].double().repeat_interleave(2, 1).mT).max() > 65504
    y = attend(*big, tensors[2], 200 * codebook(case), how, sight(case))
    assert y.isfinite().all() and y.abs().max() <= tensors[2].abs().max()
    assert all(t.isfinite().all() for t in gradients(y, [*big, tensors[2]], upstream))


def changed_after(tensors: list[Tensor], token: int, case: Case) -> list[Tensor]:
    """Other queries, keys and values behind a token."""
    others = [4 * t for t in inputs(case, tensors[0].dtype, seed=11)[:3]]
    return [
        torch.cat((t[:, :, : token + 1], o[:, :, token + 1 :]), 2).detach()
        for t, o in zip(tensors, others, strict=True)
    ]


@by_granularity
@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("window", [0, 50])
def test_nothing_that_comes_later_changes_a_causal_output(granularity: str, mask: str, window: int) -> None:
    """To the bit, wherever the later tokens begin: within a block of queries as well as behind one."""
    case, how = Case(130, 130, is_causal=True, mask=mask, window=window), choice(granularity)
    *tensors, _ = inputs(case)
    words, see = codebook(case), sight(case)
    y = attend(*tensors, words, how, see)
    for token in [*range(60, 80), 95, 100, 111, 128]:
        other = attend(*changed_after(tensors, token, case), words, how, see)
        different = (other != y).any(-1).any(1).any(0).nonzero().flatten().tolist()
        assert min(different) > token, f"what comes after token {token} changed the outputs of {different[:9]}"


@by_granularity
@pytest.mark.parametrize("mask", ["none", "left"])
@pytest.mark.parametrize("window", [0, 50])
def test_nothing_of_a_later_block_changes_a_causal_output(granularity: str, mask: str, window: int) -> None:
    case, how = Case(130, 130, is_causal=True, mask=mask, window=window), choice(granularity)
    *tensors, _ = inputs(case)
    words, see = codebook(case), sight(case)
    y = attend(*tensors, words, how, see)
    for token in range(SIZE - 1, 128, SIZE):  # the last one of a block
        other = attend(*changed_after(tensors, token, case), words, how, see)
        assert torch.equal(other[:, :, : token + 1], y[:, :, : token + 1])
        assert not torch.equal(other[:, :, token + 1 :], y[:, :, token + 1 :])


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2])
def test_kept_bytes_are_the_formula_and_linear(granularity: str, dtype: torch.dtype, groups: int) -> None:
    found = []
    for length in (64, 128, 256, 512):
        case = Case(length, length, groups=groups, is_causal=True, values=24, features=16)
        *tensors, _ = inputs(case, dtype)
        words = codebook(case)
        kept = memsave.saved_bytes(lambda t=tensors, w=words, c=case: attend(*t, w, choice(granularity), sight(c)))
        shapes = [tuple(t.shape) for t in tensors]
        elements = case.batch * length * (4 * 16 + groups * (16 + 24) + 4 * 24)
        statistics = case.batch * 4 * length * max(4, dtype.itemsize)
        assert kept == words.nbytes + kept_bytes(*shapes, dtype)  # type: ignore[arg-type]
        assert kept == words.nbytes + elements * dtype.itemsize + statistics
        found.append(kept - words.nbytes)
    assert found[1] - found[0] == found[0] and found[3] == 8 * found[0]


@by_granularity
def test_the_output_has_the_memory_of_tokens_first(granularity: str) -> None:
    """So that heads are joined without a copy."""
    case = CASES["causal"]
    *tensors, _ = inputs(case)
    assert attend(*tensors, codebook(case), choice(granularity), sight(case)).transpose(1, 2).is_contiguous()


@by_granularity
@pytest.mark.parametrize(("rows", "keys"), [(0, 40), (3, 1), (0, 0), (5, 0)])
def test_few_or_no_queries_and_keys(granularity: str, rows: int, keys: int) -> None:
    case = Case(rows, keys)
    *tensors, upstream = inputs(case)
    y = attend(*tensors, codebook(case), choice(granularity), Visibility(None, False, 0, 0, rows == keys))
    assert y.shape == (2, 4, rows, 8)
    expected = F.scaled_dot_product_attention(*tensors, enable_gqa=True) if keys else torch.zeros_like(y)
    torch.testing.assert_close(y, expected)
    for gradient, tensor in zip(gradients(y, tensors, upstream), tensors, strict=True):
        assert gradient.shape == tensor.shape and gradient.isfinite().all()


@by_granularity
def test_a_codebook_that_is_replaced_before_backward_changes_no_gradient(granularity: str) -> None:
    case, how = CASES["causal"], choice(granularity)
    *tensors, upstream = inputs(case)
    words = codebook(case)
    y = attend(*tensors, words, how, sight(case))
    expected = gradients(attend(*tensors, words.clone(), how, sight(case)), tensors, upstream)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z = attend(*tensors, changed := words.clone(), how, sight(case))
        changed.add_(1)
        gradients(z, tensors, upstream)
    words = codebook(case, seed=9)
    assert all(torch.equal(*pair) for pair in zip(gradients(y, tensors, upstream), expected, strict=True))


def test_there_is_no_second_derivative() -> None:
    case = CASES["causal"]
    *tensors, upstream = inputs(case)
    y = attend(*tensors, codebook(case), choice("token"), sight(case))
    (gradient,) = torch.autograd.grad(y, tensors[:1], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice through a function of memsave"):
        gradient.sum().backward()


@by_granularity
def test_all_implementations_of_the_ops_agree(granularity: str) -> None:
    """Integers decide which keys are chosen, so the lists are the same, and the sums but for rounding."""
    case, how = CASES["left_padding"], choice(granularity)
    *tensors, upstream = inputs(case)
    outputs = []
    for name in ("reference", "fastest"):
        with ops.use_reference() if name == "reference" else torch.enable_grad():
            y = attend(*tensors, codebook(case), how, sight(case))
            outputs.append([y, *gradients(y, tensors, upstream)])
    for first, second in zip(*outputs, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-12)


def test_chunks_bound_what_backward_takes() -> None:
    """The lists of all queries are never there at once: 8 times the queries, not 8 times the memory for lists."""
    extra = []
    how, see = Choice(128, "token", SIZE), Visibility(None, False, 0, 0, False)
    for rows in (2048, 16384):
        case = Case(rows, 256, batch=1, heads=2, groups=2, features=16, values=16)
        *tensors, upstream = inputs(case, torch.float32)
        words = codebook(case)

        def step(t: list[Tensor] = tensors, u: Tensor = upstream, w: Tensor = words) -> None:
            torch.autograd.backward(attend(*t, w, how, see), u)
            for each in t:
                each.grad = None

        lists = 4 * 2 * rows * 128
        linear = 2 * (3 * tensors[0].nbytes + 2 * tensors[1].nbytes)
        extra.append((memsave.measure(step).peak_bytes - linear, lists))
    assert function.chunk_rows is selecting.chunk_rows
    assert extra[1][0] - extra[0][0] < 0.3 * (extra[1][1] - extra[0][1])
