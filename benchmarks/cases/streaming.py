"""The benchmark cases of FlashSVD: encoder layers and models without gradients, and decoding with a cache.

B sequences of T tokens, d features; ratio is what is kept of the parameters of each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .case import Case, short
from .models import transformer

# What `FlashSVDConfig` gets besides the ratio; None is the model as it was.
WAYS: Mapping[str, Mapping[str, Any] | None] = {
    "dense": None,
    "low-rank": {"fuse": False},
    "memsave": {},
    "memsave, small pieces": {"piece_bytes": 2 * 2**20},
    "memsave, per head": {"per_head": True},
}
SIZES = ((8, 128, 0.5), (8, 512, 0.3), (8, 512, 0.5), (8, 512, 0.7), (4, 1024, 0.5), (2, 2048, 0.5), (1, 4096, 0.5))


@dataclass(frozen=True, kw_only=True)
class StreamingCase(Case):
    """One forward without gradients, at several sizes and ratios; what `forward` is given exists before.

    Attributes:
        model: makes the plain model in fp32.
        forward: the output for what `example` makes from a batch and a length.
        sizes: (B, T, ratio).
        ways: by name, what `FlashSVDConfig` gets.
    """

    kind: ClassVar[str] = "streaming"

    model: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Tensor], Tensor]
    example: Callable[[int, int], Tensor]
    sizes: tuple[tuple[int, int, float], ...] = SIZES
    ways: Mapping[str, Mapping[str, Any] | None] = field(default_factory=lambda: WAYS)
    dtype: torch.dtype = torch.float32
    method: str | None = "flash_svd"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"dtype": short(self.dtype)}


@dataclass(frozen=True, kw_only=True)
class DecodingCase(Case):
    """One further token after some, with transformers' cache and with memsave's.

    Attributes:
        model: makes the plain model in fp32.
        ratio: what is kept of the parameters of each weight of attention; the others stay dense.
        past_tokens: how many there are before.
    """

    kind: ClassVar[str] = "decoding"

    model: Callable[[], nn.Module]
    ratio: float = 0.5
    past_tokens: tuple[int, ...] = (512, 4096, 16384)
    dtype: torch.dtype = torch.float32
    method: str | None = "flash_svd"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"dtype": short(self.dtype), "ratio": self.ratio}


def vectors(width: int, batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(1))


def token_ids(batch: int, length: int) -> Tensor:
    return torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(1))


def encoder(width: int, intermediate: int, layers: int) -> nn.Module:
    settings = {"hidden_size": width, "intermediate_size": intermediate, "num_hidden_layers": layers}
    model: Any = transformer("BertConfig", "BertModel", {**settings, "max_position_embeddings": 4096})
    return model.encoder


def first_output(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)[0]


def of_vectors(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x, use_cache=False)[0]


_LLAMA_1B = {
    "vocab_size": 1000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
}
_GPT2 = {"vocab_size": 1000, "n_layer": 2, "n_positions": 32768}
_TINY_BERT = partial(encoder, 96, 192, 1)
_TINY_LLAMA = {**_LLAMA_1B, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_TINY_LLAMA |= {"num_key_value_heads": 2}
_ROTARY_WAYS = {name: way for name, way in WAYS.items() if "per head" not in name}

STREAMING_CASES = (
    StreamingCase(
        name="flash_svd_bert_layer",
        title="A layer of BERT-base without gradients, beyond its input",
        model=partial(encoder, 768, 3072, 1),
        forward=first_output,
        example=partial(vectors, 768),
        devices=("cpu", "cuda"),
        expected_s=120,
        tiny={"model": _TINY_BERT, "example": partial(vectors, 96), "sizes": ((2, 16, 0.5),)},
    ),
    StreamingCase(
        name="flash_svd_bert",
        title="BERT-base with four layers from tokens to its last hidden states, without gradients",
        model=partial(transformer, "BertConfig", "BertModel", {"num_hidden_layers": 4}),
        forward=first_output,
        example=token_ids,
        sizes=((8, 512, 0.5),),
        devices=("cpu", "cuda"),
        expected_s=120,
        tiny={
            "model": partial(
                transformer,
                "BertConfig",
                "BertModel",
                {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
            ),
            "sizes": ((2, 16, 0.5),),
        },
    ),
    StreamingCase(
        name="flash_svd_minilm_layer",
        title="A layer of MiniLM-L6 without gradients, beyond its input",
        model=partial(encoder, 384, 1536, 1),
        forward=first_output,
        example=partial(vectors, 384),
        sizes=((32, 128, 0.5), (8, 512, 0.5), (2, 2048, 0.5)),
        expected_s=40,
        tiny={"model": _TINY_BERT, "example": partial(vectors, 96), "sizes": ((2, 16, 0.5),)},
    ),
    StreamingCase(
        name="flash_svd_llama_1b",
        title="Two layers of Llama-3.2-1B without gradients and cache",
        model=partial(transformer, "LlamaConfig", "LlamaModel", _LLAMA_1B),
        forward=of_vectors,
        example=partial(vectors, 2048),
        sizes=((8, 512, 0.5), (1, 4096, 0.5)),
        ways=_ROTARY_WAYS,
        devices=("cuda",),
        dtype=torch.bfloat16,
        expected_s=60,
        tiny={
            "model": partial(transformer, "LlamaConfig", "LlamaModel", _TINY_LLAMA),
            "example": partial(vectors, 64),
            "sizes": ((2, 16, 0.5),),
        },
    ),
)
DECODING_CASES = (
    DecodingCase(
        name="flash_svd_decoding_gpt2",
        title="One further token of a GPT-2 with two layers",
        model=partial(transformer, "GPT2Config", "GPT2LMHeadModel", _GPT2),
        devices=("cpu", "cuda"),
        expected_s=15,
        tiny={
            "model": partial(
                transformer, "GPT2Config", "GPT2LMHeadModel", {**_GPT2, "n_embd": 64, "n_head": 4, "n_layer": 1}
            ),
            "past_tokens": (8,),
        },
    ),
    DecodingCase(
        name="flash_svd_decoding_llama_1b",
        title="One further token of a Llama-3.2-1B with two layers",
        model=partial(transformer, "LlamaConfig", "LlamaForCausalLM", _LLAMA_1B),
        devices=("cpu", "cuda"),
        expected_s=20,
        tiny={
            "model": partial(transformer, "LlamaConfig", "LlamaForCausalLM", _TINY_LLAMA),
            "past_tokens": (8,),
        },
    ),
)
