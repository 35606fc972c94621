"""`nn.MultiheadAttention` with sparse attention: every way to call it, in torch's transformers, what it keeps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import SparseMHAConfig
from memsave.nn.sparse_attention import state
from memsave.nn.sparse_attention.codebooks import KeySample
from memsave.nn.sparse_attention.multihead import SparseMultiheadAttention, keys_of

WIDTH, HEADS, B, T, S = 16, 4, 2, 70, 83
by_granularity = pytest.mark.parametrize("granularity", ["token", "block"])


def config(**settings: Any) -> SparseMHAConfig:
    usual = {"target_modules": r".*", "keep": 8, "granularity": "token", "block_size": 16, "dense_below": 0}
    return SparseMHAConfig(**{**usual, **settings})


def attention(**settings: Any) -> Any:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, **settings})
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return module


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


class Holder(nn.Module):
    """A model that is its attention module: a model itself is never converted."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = copy.deepcopy(attention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.attention(*args, **kwargs)


def converted(module: Any, *call: Tensor, **settings: Any) -> Any:
    """A copy of an attention module, converted with a calibration by one call of it."""
    model = Holder(module)
    memsave.convert_model(model, config(**settings), calibration=[call])
    return model.attention


def all_keys(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Sparse attention keeps all keys from now on; the sizes of its calls."""
    attend, calls = state.attend, []

    def whole(q: Tensor, k: Tensor, v: Tensor, words: Tensor, how: Any, *more: Any) -> Tensor:
        calls.append((q.shape[2], k.shape[2]))
        return attend(q, k, v, words, how._replace(keep=1.0), *more)

    monkeypatch.setattr(state, "attend", whole)
    return calls


PADDING = torch.arange(S) >= torch.tensor([[S], [60]])
HIDDEN = torch.rand(T, S, generator=torch.Generator().manual_seed(3)) < 0.3
BY_HEAD = torch.rand(B * HEADS, T, S, generator=torch.Generator().manual_seed(4)) < 0.3


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill_(mask, float("-inf"))


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "second": ({"batch_first": False}, {"key_padding_mask": PADDING}),
    "without_bias": ({"bias": False}, {}),
    "sizes": ({"kdim": 10, "vdim": 12}, {"key_padding_mask": PADDING, "attn_mask": HIDDEN}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "added_padding": ({}, {"key_padding_mask": added(PADDING)}),
    "mask": ({}, {"attn_mask": HIDDEN}),
    "added_mask": ({}, {"attn_mask": added(HIDDEN), "key_padding_mask": added(PADDING)}),
    "mask_by_head": ({}, {"attn_mask": BY_HEAD}),
    "added_mask_by_head": ({}, {"attn_mask": added(BY_HEAD), "key_padding_mask": added(PADDING)}),
    "causal": ({}, {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(1), "is_causal": True}),
    "causal_padding": (
        {}, {"attn_mask": torch.ones(T, S, dtype=torch.bool).triu(1), "is_causal": True, "key_padding_mask": PADDING}
    ),
}  # fmt: skip


def shapes(settings: dict[str, Any]) -> list[tuple[int, ...]]:
    sizes = [(B, T, WIDTH), (B, S, settings.get("kdim", WIDTH)), (B, S, settings.get("vdim", WIDTH))]
    return sizes if settings.get("batch_first", True) else [(n, b, w) for b, n, w in sizes]


def assert_alike(module: Any, plain: Any, inputs: list[Tensor], tolerance: float = 1e-5, **kwargs: Any) -> None:
    outputs = []
    for each in (module, plain):
        y, weights = each(*inputs, **kwargs)
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
        outputs.append([y, *torch.autograd.grad(y, [*dict.fromkeys(inputs), *each.parameters()], upstream)])
        outputs[-1] += [weights] if weights is not None else []
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("need_weights", [None, "averaged", "by head"])
@pytest.mark.parametrize("name", CALLS)
def test_dense_calls_are_those_of_torch(name: str, need_weights: str | None) -> None:
    settings, given = CALLS[name]
    plain, inputs = attention(**settings), tensors(*shapes(settings))
    asked = {"need_weights": need_weights is not None, "average_attn_weights": need_weights == "averaged"}
    for each in ({"dense_below": 1000}, {"keep": 1.0}, {"keep": 1.0, "granularity": "block"}):
        assert_alike(converted(plain, *inputs, **each), plain, inputs, **given, **asked)


@by_granularity
@pytest.mark.parametrize("name", CALLS)
def test_sparse_attention_to_all_keys_is_torchs(name: str, granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the lists: what is hidden stays hidden, and gradients reach all parameters."""
    settings, given = CALLS[name]
    plain, inputs = attention(**settings), tensors(*shapes(settings))
    module = converted(plain, *inputs, granularity=granularity)
    calls = all_keys(monkeypatch)
    assert_alike(module, plain, inputs, need_weights=False, **given)
    assert calls == [(T, S)]


@by_granularity
def test_self_attention_without_a_batch(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for batch_first in (True, False):
        plain, (x,) = attention(batch_first=batch_first), tensors((T, WIDTH))
        module = converted(plain, x, x, x, granularity=granularity)
        padding = torch.arange(T) >= 50
        with monkeypatch.context() as patch:
            assert not torch.equal(module(x, x, x, need_weights=False)[0], plain(x, x, x)[0])
            calls = all_keys(patch)
            assert_alike(module, plain, [x, x, x], need_weights=False, key_padding_mask=padding)
            by_head = torch.rand(HEADS, T, T, generator=torch.Generator().manual_seed(4)) < 0.3
            assert_alike(module, plain, [x, x, x], need_weights=False, attn_mask=by_head)
            assert calls == [(T, T)] * 2
        dense = converted(plain, x, x, x, dense_below=1000)
        assert dense(x, x, x)[1].shape == (T, T)
        assert_alike(dense, plain, [x, x, x], average_attn_weights=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    plain, (x,) = attention().to(dtype), tensors((B, T, WIDTH), dtype=dtype)
    module = converted(plain, x, x, x)
    y, _ = module(x, x, x, need_weights=False)
    assert y.dtype == dtype and y.isfinite().all() and module.codebook.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = attention()(*[x.float()] * 3, need_weights=False)
        sparse = converted(attention(), *[x.float()] * 3)
        z, _ = sparse(*[x.float()] * 3, need_weights=False)
    assert y.dtype == z.dtype == torch.bfloat16


def test_dropout_where_attention_is_dense_is_torchs() -> None:
    plain, (x,) = attention(dropout=0.3), tensors((B, T, WIDTH))
    module = converted(plain, x, x, x, dense_below=T + 1)
    for need_weights in (False, True):
        outputs = []
        for each in (plain, module):
            torch.manual_seed(4)
            outputs.append(each(x, x, x, need_weights=need_weights)[0])
        torch.testing.assert_close(*outputs)


def test_each_head_has_its_own_codebook_and_padding_is_not_in_it() -> None:
    plain, (x,) = attention(), tensors((B, T, WIDTH))
    padding = torch.arange(T) >= torch.tensor([[T], [40]])
    far = x.detach().masked_fill(padding[..., None], 1e3)
    model = Holder(plain)
    batch = {"query": far, "key": far, "value": far, "key_padding_mask": padding, "need_weights": False}
    memsave.convert_model(model, config(), calibration=[batch])
    assert model.attention.codebook.shape == (HEADS, 1, 16, 4) and model.attention.codebook.abs().max() < 50


@pytest.mark.parametrize("settings", [{}, {"batch_first": False}, {"kdim": 10, "vdim": 12}, {"bias": False}])
def test_the_keys_of_a_call(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What calibration collects is what attention reads."""
    plain = attention(**settings)
    inputs = tensors(*shapes(settings))
    module = converted(plain, *inputs)
    seen: list[Tensor] = []
    attend = state.attend
    monkeypatch.setattr(state, "attend", lambda q, k, *more: (seen.append(k), attend(q, k, *more))[1])
    module(*inputs, need_weights=False)
    keys, padding = keys_of(plain, tuple(inputs), {"key_padding_mask": added(PADDING)})
    torch.testing.assert_close(keys, seen[0])
    assert padding is not None and torch.equal(padding, ~PADDING)
    unbatched = [t[0] if plain.batch_first else t[:, 0] for t in inputs]
    alone, _ = keys_of(plain, (), dict(zip(("query", "key", "value"), unbatched, strict=True)))
    torch.testing.assert_close(alone, keys[:1])


def encoder(**settings: Any) -> Any:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.0, **{"batch_first": True, **settings})
    model = nn.TransformerEncoder(layer, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return model


TARGETS = {"target_modules": r".*self_attn|.*multihead_attn"}


@by_granularity
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_an_encoder_in_evaluation_does_not_bypass_the_conversion(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch has one kernel for a whole layer, and makes nested tensors of padded ones; both would read the weights."""
    plain, (x,) = encoder().eval(), tensors((B, T, WIDTH))
    padding = torch.arange(T) >= torch.tensor([[T], [60]])
    model = copy.deepcopy(plain)
    keep = 8 if granularity == "token" else 48
    memsave.convert_model(model, config(granularity=granularity, keep=keep, **TARGETS), calibration=[x])
    nested: list[bool] = []
    forward = SparseMultiheadAttention.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            SparseMultiheadAttention,
            "forward",
            lambda self, q, *more, **kwargs: (nested.append(q.is_nested), forward(self, q, *more, **kwargs))[1],
        )
        with torch.no_grad():
            quick = model(x, src_key_padding_mask=padding)
    assert nested.count(True) == 2  # each layer of nested tensors, which calls the attention again with padded ones
    slow = model(x, src_key_padding_mask=padding)
    assert slow.requires_grad
    if granularity == "token":  # for blocks, the queries of what is padding have a say, and here it is another padding
        torch.testing.assert_close(quick[~padding], slow.detach()[~padding], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (plain(x, src_key_padding_mask=padding) - quick)[~padding].abs().max() > 1e-2
        torch.testing.assert_close(model.layers[0](x), model.train().layers[0](x))  # torch's kernel is for evaluation
        model.eval()
        calls = all_keys(monkeypatch)
        found, expected = model(x, src_key_padding_mask=padding), plain(x, src_key_padding_mask=padding)
    assert len(calls) == 2
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_batches_of_an_encoder_with_padding_are_nested_tensors_and_their_padding_is_no_key() -> None:
    model, (x,) = encoder().eval(), tensors((B, T, WIDTH))
    padding = torch.arange(T) >= torch.tensor([[T], [60]])
    far = x.detach().masked_fill(padding[..., None], 1e3)
    batches = [{"src": far, "src_key_padding_mask": padding}]
    memsave.convert_model(model, config(**TARGETS), calibration=batches)
    assert all(layer.self_attn.codebook.abs().max() < 50 for layer in model.layers)


@by_granularity
def test_a_decoder_attends_to_itself_in_order_and_to_all_of_the_memory(
    granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain: Any = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, 0.0, batch_first=True), 2)
    x, memory = tensors((B, T, WIDTH), (B, S, WIDTH))
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    batch = {"tgt": x, "memory": memory, "tgt_mask": mask, "tgt_is_causal": True}
    model = copy.deepcopy(plain)
    memsave.convert_model(model, config(granularity=granularity, **TARGETS), calibration=[batch])
    assert sum(isinstance(m, SparseMultiheadAttention) for m in model.modules()) == 4
    first = model(**batch)
    other = torch.cat((x[:, :50], 2 + x[:, 50:]), 1)
    again = model(**batch | {"tgt": other})
    assert torch.equal(first[:, :50], again[:, :50]) and not torch.equal(first, again)
    calls = all_keys(monkeypatch)
    torch.testing.assert_close(model(**batch), plain(**batch), rtol=1e-4, atol=1e-5)
    assert calls == [(T, T), (T, S)] * 2


@by_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_kept_bytes_are_the_formula(granularity: str, dtype: torch.dtype) -> None:
    """Less than torch's own, whose projections are kept in another form, too."""
    found = []
    for length in (80, 160):
        plain, (x,) = attention().to(dtype), tensors((B, length, WIDTH), dtype=dtype)
        module = converted(plain, x, x, x, granularity=granularity, keep=8)
        kept = memsave.saved_bytes(lambda m=module, x=x: m(x, x, x, need_weights=False)[0])
        assert kept == module.kept_bytes(x.shape, dtype)
        assert kept <= memsave.saved_bytes(lambda m=plain, x=x: m(x, x, x, need_weights=False)[0])
        found.append(kept)
    assert found[1] == 2 * found[0]


def test_a_sample_of_nothing_does_not_stop_a_module_that_other_batches_reach() -> None:
    sample = KeySample(10)
    module, (x,) = attention(), tensors((B, T, WIDTH))
    everything = torch.ones(B, T, dtype=torch.bool)
    sample.add(*keys_of(module, (x, x, x), {"key_padding_mask": everything}))
    assert sample.keys is not None and sample.keys.shape[1] == 0
    batches = [{"query": x, "key": x, "value": x, "key_padding_mask": mask} for mask in (everything, None)]
    memsave.convert_model(Holder(module), config(), calibration=batches)
    with pytest.raises(ValueError, match="no batch reached attention"):
        memsave.convert_model(Holder(module), config(), calibration=batches[:1])
