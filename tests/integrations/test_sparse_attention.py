"""Transformers models with sparse attention: plain where nothing is left out, masks of all kinds, caches."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import memsave
from memsave import SparseMHAConfig

hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

from memsave.nn.sparse_attention import state  # noqa: E402

from ..architectures.models import ARCHITECTURES, TINY, Architecture  # noqa: E402

SIZE = dataclasses.replace(TINY, tokens=72, frames=144, image=36, patch=4)
"""More than four blocks of 16 tokens in every sequence."""
BY_NAME = {a.name: a for a in ARCHITECTURES}
NAMES = [name for name in BY_NAME if name not in ("T5", "Gemma2")]  # a bias of positions; no SDPA in transformers
by_granularity = pytest.mark.parametrize("granularity", ["token", "block"])
CACHED = ["Llama", "Mistral", "Qwen3", "Gemma3", "Phi-3", "GPT-2", "OPT"]


def config(**settings: Any) -> SparseMHAConfig:
    usual = {"target_modules": r".*", "keep": 8, "granularity": "token", "block_size": 16, "dense_below": 0}
    return SparseMHAConfig(**{**usual, **settings})


def made(name: str, **changed: Any) -> Any:
    """A model in evaluation mode whose attention is that of SDPA."""
    architecture: Architecture = BY_NAME[name]
    if changed:
        settings = architecture.settings
        architecture = dataclasses.replace(architecture, settings=lambda size, p: settings(size, p) | changed)
    return architecture.make(SIZE).eval()


def batch(name: str, padding: str | None = None) -> dict[str, Tensor]:
    return BY_NAME[name].batch(SIZE, padding)


def converted(model: Any, calibration: Any, **settings: Any) -> Any:
    model = copy.deepcopy(model)
    memsave.convert_model(model, config(**settings), calibration=calibration)
    return model


def sparse_calls(model: Any, run: Any) -> list[tuple[int, int]]:
    """Numbers of queries and keys of the calls of sparse attention."""
    calls: list[tuple[int, int]] = []
    attend = state.attend

    def counted(query: Tensor, key: Tensor, *args: Any) -> Tensor:
        calls.append((query.shape[2], key.shape[2]))
        return attend(query, key, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "attend", counted)
        with torch.no_grad():
            run(model)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_all_keys_is_the_plain_model(name: str) -> None:
    """With and without padding: by a fraction of 1, by a number that no call has, and where calls are too short."""
    plain = made(name)
    for padding in (None, "left", "right") if BY_NAME[name].padded else (None,):
        given = batch(name, padding)
        with torch.no_grad():
            expected = plain(**given).logits
            for settings in ({"keep": 1.0}, {"keep": 500}, {"dense_below": 500}, {"keep": 1.0, "granularity": "block"}):
                found = converted(plain, [given], **settings)(**given).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@by_granularity
@pytest.mark.parametrize("name", NAMES)
def test_sparse_attention_through_all_of_torch_is_the_plain_model(
    name: str, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lists, here of all keys, through masks, windows, groups and scales: with gradients."""
    attend = state.attend
    monkeypatch.setattr(
        state, "attend", lambda q, k, v, words, how, *a: attend(q, k, v, words, how._replace(keep=1.0), *a)
    )
    plain = made(name).train()
    padding = "left" if BY_NAME[name].padded else None
    given = batch(name, padding)
    model = converted(plain, [given], granularity=granularity)
    losses, gradients = [], []
    for each in (plain, model):
        loss = each(**given).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in each.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    largest = max(g.abs().max() for g in gradients[0])
    for theirs, mine in zip(*gradients, strict=True):
        assert (mine - theirs).abs().max() <= 1e-4 * max(theirs.abs().max(), 1e-2 * largest)


def test_which_calls_are_sparse() -> None:
    """Every layer's, of Whisper the encoder's, the decoder's and those between them."""
    llama = converted(made("Llama"), [batch("Llama")])
    assert sparse_calls(llama, lambda m: m(**batch("Llama"))) == [(72, 72)] * 2
    whisper = converted(made("Whisper"), [batch("Whisper")])
    assert sparse_calls(whisper, lambda m: m(**batch("Whisper"))) == [(72, 72)] * 6
    long = converted(made("Llama"), [batch("Llama")], dense_below=73)
    assert not sparse_calls(long, lambda m: m(**batch("Llama")))
    assert converted(made("Llama"), [batch("Llama")], dense_below=72) is not None
    at = converted(made("Llama"), [batch("Llama")], dense_below=72)
    assert len(sparse_calls(at, lambda m: m(**batch("Llama")))) == 2


@by_granularity
@pytest.mark.parametrize("name", CACHED)
def test_no_logit_depends_on_later_tokens(name: str, granularity: str) -> None:
    """Strictly: whichever token comes next, and not only at the ends of blocks."""
    keep = 8 if granularity == "token" else 48
    model = converted(made(name), [batch(name)], granularity=granularity, keep=keep)
    ids = batch(name)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        for token in (33, 47, 50, 55, 63, 64, 70):
            other = ids.clone()
            other[:, token + 1 :] = (ids[:, token + 1 :] + 7) % 40 + 2
            again = model(other).logits
            assert torch.equal(again[:, : token + 1], logits[:, : token + 1]), f"token {token}"
            assert not torch.equal(again, logits)


@by_granularity
@pytest.mark.parametrize("tokens", [72, 90])
def test_no_logit_of_a_decoder_depends_on_later_tokens_by_what_it_reads_of_the_encoder(
    tokens: int, granularity: str
) -> None:
    """As many tokens as the encoder has, so that nothing tells the one from the other, and more."""
    keep = 8 if granularity == "token" else 48
    given = batch("Whisper")
    model = converted(made("Whisper"), [given], granularity=granularity, keep=keep)
    ids = torch.randint(2, 48, (2, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_features=given["input_features"], decoder_input_ids=ids).logits
        for token in (20, 50, 55, 63, 66):
            other = torch.cat((ids[:, : token + 1], 47 - ids[:, token + 1 :]), 1)
            again = model(input_features=given["input_features"], decoder_input_ids=other).logits
            assert torch.equal(again[:, : token + 1], logits[:, : token + 1]), f"token {token}"
            assert not torch.equal(again, logits)


@pytest.mark.parametrize("name", CACHED)
def test_generation_with_a_cache_gives_the_tokens_of_one_without(name: str) -> None:
    """Greedy, with padding on the left, keys chosen one by one, and a fixed number of them."""
    model = converted(made(name, use_cache=True), [batch(name)])
    given = {key: value for key, value in batch(name, "left").items() if key != "labels"}
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(**given, **settings, use_cache=True)
    calls = sparse_calls(model, lambda m: m.generate(**given, **settings, use_cache=True))
    assert (1, 80) in calls or name in ("Mistral", "Gemma3")  # windows of 36 tokens
    assert torch.equal(cached, model.generate(**given, **settings, use_cache=False))
    plain = made(name, use_cache=True).generate(**given, **settings)
    assert not torch.equal(cached, plain) and cached.shape == plain.shape


@by_granularity
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_generation_with_all_keys_is_plain_with_every_cache(
    name: str, padding: str | None, cache: str, granularity: str
) -> None:
    plain = made(name, use_cache=True)
    model = converted(plain, [batch(name)], keep=1.0, granularity=granularity)
    given = {key: value for key, value in batch(name, padding).items() if key != "labels"}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    settings |= {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(model.generate(**given, **settings), plain.generate(**given, **settings))


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_a_static_cache_gives_the_tokens_of_a_growing_one(name: str, padding: str | None) -> None:
    """Its keys are more than there are tokens: a mask of queries and keys hides the rest, and no list names them."""
    model = converted(made(name, use_cache=True), [batch(name)])
    given = {key: value for key, value in batch(name, padding).items() if key != "labels"}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    growing = model.generate(**given, **settings)
    static = model.generate(**given, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, growing)


@by_granularity
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_a_prompt_in_a_static_cache_is_read_as_without_a_cache(name: str, granularity: str) -> None:
    """Without a mask: the queries stand beside the first keys, and the rest of the cache is behind them."""
    keep = 8 if granularity == "token" else 48
    model = converted(made(name, use_cache=True), [batch(name)], granularity=granularity, keep=keep)
    ids = batch(name)["input_ids"]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = hf.StaticCache(model.config, max_cache_len=120)
        found = model(input_ids=ids, cache=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CACHED)
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    """Keys are chosen one by one among the real ones, so real tokens get what they get alone."""
    model = converted(made(name), [batch(name)])
    given = batch(name, "left")
    ids, mask = given["input_ids"], given["attention_mask"]
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    start = int((mask[1] == 0).sum())
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=places).logits
        alone = model(ids[1:, start:], position_ids=torch.arange(72 - start)[None]).logits
        whole = model(ids[:1]).logits
    if name != "OPT":  # its positions come from the mask
        torch.testing.assert_close(padded[1, start:], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[0], whole[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_padding_in_an_encoder_never_reaches_real_tokens(granularity: str) -> None:
    """Padding that ends within a block of queries."""
    keep = 8 if granularity == "token" else 48
    model = converted(made("BERT"), [batch("BERT")], granularity=granularity, keep=keep)
    ids = batch("BERT")["input_ids"]
    for real in (50, 53, 57, 69):
        mask = torch.ones(2, 72, dtype=torch.long)
        mask[1, real:] = 0
        other = ids.clone()
        other[1, real:] = 5
        with torch.no_grad():
            first, second = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
        assert torch.equal(first[1, :real], second[1, :real]), f"{72 - real} tokens of padding"


@by_granularity
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2", "BERT"])
def test_padding_on_the_right_changes_nothing(name: str, granularity: str) -> None:
    """Blocks begin at the same tokens, too; in an encoder the number of keys that are kept stays the same."""
    keep = 8 if granularity == "token" else 48
    model = converted(made(name), [batch(name)], granularity=granularity, keep=keep)
    given = batch(name, "right")
    ids, mask = given["input_ids"], given["attention_mask"]
    real = int(mask[1].sum())
    with torch.no_grad():
        padded, alone = model(ids, attention_mask=mask).logits, model(ids[1:, :real]).logits
        torch.testing.assert_close(padded[1, :real], alone[0], rtol=1e-4, atol=1e-5)
        other = ids.clone()
        other[1, real:] = 5
        again = model(other, attention_mask=mask).logits
    assert torch.equal(again[1, :real], padded[1, :real]) and torch.equal(again[0], padded[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_by_blocks_never_reaches_real_tokens(side: str) -> None:
    """Padding on the left shifts blocks, so the choice may be another one; but what is padding has no effect."""
    model = converted(made("Llama"), [batch("Llama")], granularity="block", keep=48)
    given = batch("Llama", side)
    real = given["attention_mask"].bool()
    other = given["input_ids"].where(real, 3)
    with torch.no_grad():
        first, second = model(**given).logits, model(**given | {"input_ids": other}).logits
    torch.testing.assert_close(first[real], second[real], rtol=1e-4, atol=1e-5)


@by_granularity
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_a_mask_of_the_callers(name: str, granularity: str) -> None:
    """Of every query and key, bool and added: what it hides has no effect, and the causal one is the usual one."""
    keep = 8 if granularity == "token" else 48
    model = converted(made(name), [batch(name)], granularity=granularity, keep=keep)
    ids = batch(name)["input_ids"]
    mask = torch.ones(2, 1, 72, 72, dtype=torch.bool).tril()
    with torch.no_grad():
        if name == "Llama":
            whole = model(ids, attention_mask=mask).logits
            torch.testing.assert_close(whole, model(ids).logits, rtol=1e-4, atol=1e-5)
        mask[:, :, 30:, :12] = False
        found = model(ids, attention_mask=mask).logits
        added = torch.zeros(mask.shape).masked_fill_(~mask, torch.finfo(torch.float32).min)
        assert torch.equal(model(ids, attention_mask=added).logits, found)
        hidden = ids.clone()
        hidden[:, :12] = 9
        late = mask & (torch.arange(72) >= 12)
        first, again = (model(x, attention_mask=late).logits for x in (ids, hidden))
        torch.testing.assert_close(again[:, 12:], first[:, 12:], rtol=1e-4, atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    """Found by their positions: each is what it is alone, where keys are chosen one by one."""
    model = converted(made("Llama"), [batch("Llama")])
    ids = batch("Llama")["input_ids"][:1]
    places = torch.cat((torch.arange(40), torch.arange(32)))[None]
    with torch.no_grad():
        packed = model(ids, position_ids=places, use_cache=False).logits
        parts = [model(ids[:, part], use_cache=False).logits for part in (slice(0, 40), slice(40, 72))]
    torch.testing.assert_close(packed, torch.cat(parts, 1), rtol=1e-4, atol=1e-5)


def test_packed_sequences_by_blocks_do_not_see_each_other() -> None:
    model = converted(made("Llama"), [batch("Llama")], granularity="block", keep=48)
    ids = batch("Llama")["input_ids"][:1]
    places = torch.cat((torch.arange(40), torch.arange(32)))[None]
    other = ids.clone()
    other[:, :40] = 11
    with torch.no_grad():
        first, second = (model(x, position_ids=places, use_cache=False).logits for x in (ids, other))
    torch.testing.assert_close(first[:, 56:], second[:, 56:], rtol=1e-4, atol=1e-5)


@by_granularity
def test_chunks_of_a_prompt_with_a_cache(granularity: str) -> None:
    """The last queries stand beside the last keys: as in one call for single keys, and where all are kept."""
    plain = made("Llama", use_cache=True)
    ids = batch("Llama")["input_ids"]
    for keep in (1.0, 500, 16):
        model = converted(plain, [batch("Llama")], granularity=granularity, keep=keep)
        with torch.no_grad():
            whole = model(ids).logits
            cache = hf.DynamicCache(config=model.config)
            parts = [model(ids[:, part], cache=cache).logits for part in (slice(0, 64), slice(64, 72))]
            found = torch.cat(parts, 1)
            if granularity == "token" or keep != 16:
                torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
            assert found.isfinite().all()


def test_a_model_with_a_bias_of_positions_is_refused() -> None:
    """T5's, when its keys are collected, or when it is called; the model stays what it was."""
    model = made("T5")
    expected = model(**batch("T5")).logits
    with pytest.raises(ValueError, match="T5Attention: .* gives position_bias, too; leave this module out"):
        memsave.convert_model(model, config(), calibration=[batch("T5")])
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**batch("T5")).logits, expected)
    memsave.convert_model(model, config(codebook="ema"))
    with pytest.raises(ValueError, match="position_bias"):
        model(**batch("T5"))
    memsave.restore_model(model, allow_lossy=True)
    assert torch.equal(model(**batch("T5")).logits, expected)


def test_a_bias_added_by_the_caller_is_refused() -> None:
    model = converted(made("Llama"), [batch("Llama")])
    ids = batch("Llama")["input_ids"]
    alibi = -torch.arange(72.0).sub(torch.arange(72.0)[:, None]).abs().expand(2, 1, -1, -1)
    with pytest.raises(ValueError, match="LlamaAttention: the attention mask adds something else .* ALiBi"):
        model(ids, attention_mask=alibi)


@pytest.mark.parametrize("implementation", ["eager"])
def test_another_attention_than_sdpa_is_refused(implementation: str) -> None:
    model = made("Llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(memsave.NoMatchError, match="its attention is 'eager'; only 'sdpa'"):
        memsave.convert_model(model, config(), calibration=[batch("Llama")])
    assert model.config._attn_implementation == implementation
