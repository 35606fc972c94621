"""A cache of latents: what a model generates with it, what it keeps, and where it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import memsave

from ..architectures.models import ARCHITECTURES, TINY, Architecture

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*generation.*:UserWarning"),
]
RANK = 3
ATTENTION = r".*(attn|attention|Attention).*"
BY_NAME = {a.name: a for a in ARCHITECTURES}
ROTATED = ("Llama", "Qwen3", "Gemma3", "Phi-3", "Qwen3-MoE")
ABSORBED = ("GPT-2", "OPT", "T5", "Whisper")
pairs = pytest.mark.parametrize(
    ("name", "per_head"),
    [*((name, False) for name in (*ROTATED, *ABSORBED)), *((name, True) for name in ABSORBED)],
)


def models(name: str, per_head: bool = False, **settings: Any) -> tuple[Any, Any]:
    """The model with low-rank attention, streaming and not."""
    plain = _with_biases(BY_NAME[name].make().eval())
    plain.config.use_cache = plain.generation_config.use_cache = True
    found = []
    for fuse in (True, False):
        model = copy.deepcopy(plain)
        config = memsave.FlashSVDConfig(rank=RANK, per_head=per_head, fuse=fuse, target_modules=ATTENTION, **settings)
        memsave.convert_model(model, config)
        found.append(model)
    return found[0], found[1]


def _with_biases(model: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def prompt(architecture: Architecture) -> dict[str, Any]:
    """With padding on the left."""
    batch = architecture.batch(TINY, "left")
    return {k: v for k, v in batch.items() if k != "labels" and not k.startswith("decoder_")}


def own(cache: Any) -> Any:
    return getattr(cache, "self_attention_cache", cache)


def with_cache(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


@pairs
@pytest.mark.parametrize("beams", [1, 3])
def test_generates_what_the_same_factors_do(name: str, per_head: bool, beams: int) -> None:
    model, still = models(name, per_head)
    cache = memsave.low_rank_cache(model)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "num_beams": beams,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    batch = prompt(BY_NAME[name])
    found = model.generate(**batch, past_key_values=cache, **settings)
    expected = still.generate(**batch, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))
    assert any(type(layer).__name__ == "LowRankLayer" for layer in own(cache).layers)


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Phi-3", "GPT-2", "OPT"])
@pytest.mark.parametrize("steps", [(5, 1, 1), (3, 4), (1, 1, 5), (2, 2, 3)])
def test_any_steps_give_the_logits_of_one(name: str, steps: tuple[int, ...]) -> None:
    """Also several tokens after some, as in assisted generation and chunked prompts."""
    model, still = models(name)
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = still(input_ids=ids, use_cache=False).logits
    cache = memsave.low_rank_cache(model)
    found = torch.cat([with_cache(model, part, cache) for part in ids.split(list(steps), 1)], 1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))
    assert cache.get_seq_length() == 7


def test_the_rotation_of_each_sequence_goes_with_it() -> None:
    """With padding, sequences have different positions: what is reordered, selected or repeated must keep its own."""
    model, still = models("Llama")
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, :2], mask[2, :4] = 0, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ours, theirs = memsave.low_rank_cache(model), transformers.DynamicCache(config=still.config)
    order = torch.tensor([2, 1, 0, 2, 1, 0])
    found = []
    for each, cache in ((model, ours), (still, theirs)):
        inputs: dict[str, Any] = {"use_cache": True, "past_key_values": cache}
        with torch.no_grad():
            each(input_ids=ids, attention_mask=mask, position_ids=places, **inputs)
            cache.reorder_cache(torch.tensor([2, 1, 0]))
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 4, 1, 3, 5]))
            longer = torch.cat([mask[order], torch.ones(6, 1, dtype=torch.long)], 1)
            more = {"attention_mask": longer, "position_ids": longer.sum(1, keepdim=True) - 1}
            found.append(each(input_ids=ids[order, :1], **more, **inputs).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5 * float(found[1].abs().max()))


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_cropped_and_reordered_as_transformers_own(name: str) -> None:
    model, still = models(name)
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    ours, theirs = memsave.low_rank_cache(model), transformers.DynamicCache(config=still.config)
    for each, cache in ((model, ours), (still, theirs)):
        with_cache(each, ids, cache)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([2, 2, 0]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        cache.batch_repeat_interleave(2)
    more = torch.randint(3, 40, (4, 1), generator=torch.Generator().manual_seed(1))
    found, expected = (with_cache(each, more, cache) for each, cache in ((model, ours), (still, theirs)))
    assert ours.get_seq_length() == theirs.get_seq_length() == 5
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    ours.reset()
    assert ours.get_seq_length() == 0 and ours.nbytes == 0
    again, fresh = with_cache(model, ids, ours), with_cache(model, ids, memsave.low_rank_cache(model))
    assert torch.equal(again, fresh)


def test_kept_bytes_are_those_of_the_latents_and_one_rotation() -> None:
    """Of a Llama 2 R and, once for all layers, 2 D; of a GPT-2 with one projection R."""
    tokens, size = 2 * 7, 4
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    for name, per_layer, once in (("Llama", 2 * RANK, 0.5 * 2 * TINY.head), ("GPT-2", RANK, 0)):
        model, _ = models(name)
        cache = memsave.low_rank_cache(model)
        with_cache(model, ids, cache)
        # Without padding the rotation of all sequences is one.
        assert cache.nbytes == tokens * size * (len(cache.layers) * per_layer + once), name


def test_a_layer_with_a_window_keeps_its_own_cache() -> None:
    model, _ = models("Gemma3")
    kinds = [type(layer).__name__ for layer in memsave.low_rank_cache(model).layers]
    assert "DynamicSlidingWindowLayer" in kinds and "LowRankLayer" in kinds


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("Mistral", {}, "keep a window of keys and values"),
        ("Gemma2", {}, "its scores capped"),
        ("Llama", {"per_head": True}, "factors per head and are rotated"),
    ],
)
def test_refuses_with_the_reason(name: str, settings: dict[str, Any], reason: str) -> None:
    model, _ = models(name, **settings)
    with pytest.raises(memsave.UnsupportedModelError, match=f"no layer of the model can keep latents: .*{reason}"):
        memsave.low_rank_cache(model)


def test_refuses_what_would_not_be_smaller_and_what_is_not_converted() -> None:
    plain = BY_NAME["Llama"].make().eval()
    with pytest.raises(memsave.UnsupportedModelError, match="no attention module of it was converted"):
        memsave.low_rank_cache(plain)
    memsave.convert_model(plain, memsave.FlashSVDConfig(rank=5, target_modules=[r"o_proj"]))
    with pytest.raises(memsave.UnsupportedModelError, match="its keys or values are not low-rank"):
        memsave.low_rank_cache(plain)


def test_latents_as_wide_as_the_keys_are_not_kept() -> None:
    plain = BY_NAME["OPT"].make().eval()
    wide = TINY.heads * TINY.head
    model = copy.deepcopy(plain)
    memsave.convert_model(model, memsave.FlashSVDConfig(rank=wide // 2 - 1, target_modules=ATTENTION))
    assert memsave.low_rank_cache(model)
    for layer in model.model.decoder.layers:
        layer.self_attn.k_proj.first = torch.nn.Parameter(torch.zeros(2 * wide, wide))
    with pytest.raises(memsave.UnsupportedModelError, match="are not smaller than keys and values"):
        memsave.low_rank_cache(model)


def test_a_forward_with_gradients_says_why_it_cannot_use_latents() -> None:
    model, _ = models("Llama")
    ids = torch.randint(3, 40, (1, 4))
    with pytest.raises(memsave.UnsupportedModelError, match="a low-rank cache holds latents, and an attention module"):
        model(input_ids=ids, past_key_values=memsave.low_rank_cache(model), use_cache=True)
