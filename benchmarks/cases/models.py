"""The models of the benchmark cases, with random weights.

B sequences of T tokens, d features.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

WIDTH, LAYERS, HEADS = 256, 2, 4


def transformer(config_class: str, model_class: str, settings: Mapping[str, object], **changed: object) -> nn.Module:
    """A transformers model with random weights; `changed` overrides settings."""
    import transformers

    config = getattr(transformers, config_class)(**{**settings, **changed})
    return getattr(transformers, model_class)(config)


_LLAMA = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 688,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "use_cache": False,
}
# Without dropout: its noise is the same in every variant, but hides what the norms keep.
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    **_NO_DROPOUT,
}
_GPT2 = {
    "vocab_size": 64,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "use_cache": False,
}
llama = partial(transformer, "LlamaConfig", "LlamaModel", _LLAMA)
bert = partial(transformer, "BertConfig", "BertModel", _BERT)
gpt2 = partial(transformer, "GPT2Config", "GPT2Model", _GPT2)
# Not in attention, which drops out by a function and not by a module.
bert_with_dropout = partial(bert, hidden_dropout_prob=0.1)
gpt2_with_dropout = partial(gpt2, resid_pdrop=0.1, embd_pdrop=0.1)

# Narrow, but with the proportions of Llama-3.2-1B: grouped heads, MLPs of four times the width, many classes.
_LLAMA_NARROW = {
    **_LLAMA,
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
}
llama_narrow = partial(transformer, "LlamaConfig", "LlamaForCausalLM", _LLAMA_NARROW)
llama_narrow_blocks = partial(transformer, "LlamaConfig", "LlamaModel", _LLAMA_NARROW)

# The model of examples/train_text.py.
demo = partial(
    transformer,
    "LlamaConfig",
    "LlamaForCausalLM",
    {**_LLAMA, "vocab_size": 256, "num_hidden_layers": 4, "max_position_embeddings": 256},
)
# Two layers with the proportions of Llama-3.2-1B at half its width.
llama_adapted = partial(
    transformer,
    "LlamaConfig",
    "LlamaForCausalLM",
    {
        **_LLAMA_NARROW,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
)
large_vocabulary = partial(
    transformer,
    "LlamaConfig",
    "LlamaForCausalLM",
    {**_LLAMA, "vocab_size": 8192, "max_position_embeddings": 512},
)
llama_wide = partial(
    transformer,
    "LlamaConfig",
    "LlamaForCausalLM",
    {**_LLAMA, "vocab_size": 4096, "intermediate_size": 1024, "max_position_embeddings": 4096},
)
llama_1b = partial(
    transformer,
    "LlamaConfig",
    "LlamaForCausalLM",
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "use_cache": False,
    },
)
bert_large = partial(
    transformer,
    "BertConfig",
    "BertForMaskedLM",
    {
        "vocab_size": 30522,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        **_NO_DROPOUT,
    },
)


def mlp() -> nn.Module:
    """Linears and GELUs without norms: (B, T, d) -> (B, T, d)."""
    layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def llama_with_lora() -> nn.Module:
    """LoRA of rank 8 on every linear of a frozen Llama; B is random so that A has a gradient."""
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


def loss_of_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def hidden_of_tokens(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).last_hidden_state


def from_embeddings(model: nn.Module, x: Tensor) -> Tensor:
    return model(inputs_embeds=x).last_hidden_state


def padded(model: nn.Module, x: Tensor) -> Tensor:
    """The first sequence has a quarter of its tokens, on the left, for padding."""
    mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    mask[0, : x.shape[1] // 4] = 0
    return model(inputs_embeds=x, attention_mask=mask).last_hidden_state


def direct(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)
