"""A prompt that is streamed leaves the caches of transformers' models as plain attention leaves them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import memsave
from memsave import FlashSVDConfig

from ...architectures.models import ARCHITECTURES, TINY
from .toys import counted_groups, small_budgets

transformers = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
MODELS = {a.name: a for a in ARCHITECTURES if a.name in ("Llama", "Mistral", "Gemma3", "Phi-3", "GPT-2", "OPT")}
names = pytest.mark.parametrize("name", list(MODELS))
per_head = pytest.mark.parametrize("per_head", [False, True], ids=["whole", "per_head"])


@pytest.fixture(autouse=True)
def _small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    small_budgets(monkeypatch)


@cache
def pair(name: str, per_head: bool) -> Any:
    """Without streaming and with it; no test changes them."""
    models: list[Any] = []
    for fuse in (False, True):
        models.append(MODELS[name].make().eval())
        config = FlashSVDConfig(target_modules=r".*", rank=4, per_head=per_head, fuse=fuse)
        memsave.convert_model(models[-1], config)
    return tuple(models)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(2, TINY.vocabulary, (batch, length), generator=torch.Generator().manual_seed(3))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@names
@per_head
@torch.inference_mode()
def test_the_cache_holds_what_plain_attention_puts_in(name: str, per_head: bool) -> None:
    """Prompts of one token, below the window and above it; then more tokens, some at once, which do not stream."""
    models = pair(name, per_head)
    for length in (1, 5, 12):
        prompt, more, last = ids(2, length), ids(2, 3), ids(2, 1)
        with counted_groups() as groups:
            outputs = [model(prompt, use_cache=True) for model in models]
            assert [absorbed for absorbed, _ in groups] == [False] * TINY.layers, "a cache holds all features of heads"
            steps = [(outputs[0].logits, outputs[1].logits)]
            for tokens in (more, last):
                outputs = [
                    model(tokens, past_key_values=o.past_key_values, use_cache=True)
                    for model, o in zip(models, outputs, strict=True)
                ]
                steps.append((outputs[0].logits, outputs[1].logits))
            assert len(groups) == TINY.layers
        for expected, found in steps:
            close(found, expected)
        plain, cached = (o.past_key_values for o in outputs)
        assert cached.get_seq_length() == plain.get_seq_length() == length + 4
        for mine, theirs in zip(cached.layers, plain.layers, strict=True):
            assert type(mine) is type(theirs)
            close(mine.keys, theirs.keys), close(mine.values, theirs.values)


@names
@torch.inference_mode()
def test_a_cache_of_fixed_size_is_filled_by_plain_attention(name: str) -> None:
    results, models = [], pair(name, False)
    with counted_groups() as groups:
        for model in models:
            cached = transformers.StaticCache(config=model.config, max_cache_len=20)
            first = model(ids(2, 7), past_key_values=cached, use_cache=True).logits
            results.append((first, model(ids(2, 2), past_key_values=cached, use_cache=True).logits))
    assert not groups
    for expected, found in zip(*results, strict=True):
        close(found, expected)


@per_head
@torch.inference_mode()
def test_whisper_streams_in_its_encoder_and_its_decoder(per_head: bool) -> None:
    """The decoder's caches are in pairs, of its own tokens and of the encoder's."""
    architecture = next(a for a in ARCHITECTURES if a.name == "Whisper")
    plain, model = (architecture.make().eval() for _ in range(2))
    for fuse, each in ((False, plain), (True, model)):
        memsave.convert_model(each, FlashSVDConfig(target_modules=r".*", rank=4, per_head=per_head, fuse=fuse))
    batch = architecture.batch(TINY, None)
    del batch["labels"]
    with counted_groups() as groups:
        found, expected = (each(**batch, use_cache=True) for each in (model, plain))
    assert sorted(groups) == sorted([(per_head, TINY.heads)] * TINY.layers + [(False, TINY.heads)] * TINY.layers)
    close(found.logits, expected.logits)
    for part in ("self_attention_cache", "cross_attention_cache"):
        for mine, theirs in zip(
            getattr(found.past_key_values, part).layers, getattr(expected.past_key_values, part).layers, strict=True
        ):
            close(mine.keys, theirs.keys), close(mine.values, theirs.values)
