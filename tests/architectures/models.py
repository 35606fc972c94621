"""The architectures that bare `convert_model` is shown on, at any size, with random weights and batches.

B sequences of T tokens; images (B, 3, H, W); sound as mel spectrograms (B, mel bins, frames).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PADDINGS = ("left", "right")
LABELS = 5  # more than images in a batch: else their gradients cancel
IGNORED = -100  # the label that no loss counts


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a model and of its batch.

    Attributes:
        image, patch: side lengths in pixels.
        frames: of a spectrogram; its encoder has half as many tokens.
    """

    vocabulary: int = 48
    hidden: int = 32
    intermediate: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    experts: int = 4
    experts_per_token: int = 2
    batch: int = 2
    tokens: int = 16
    image: int = 16
    patch: int = 4
    frames: int = 32

    @property
    def head(self) -> int:
        return self.hidden // self.heads


TINY = Size()
Settings = Callable[[Size, float], Mapping[str, Any]]
Batch = Callable[[Size, "str | None"], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model class of transformers.

    Attributes:
        name: as people call it.
        model, config: class names in transformers.
        settings: the config's fields for a size and a dropout probability.
        batch: a training batch for a size and the side that is padded, "left", "right" or None.
        padded: whether it reads a padding mask.
        truth: the widest dtype that transformers' code for it takes, which tells the errors of narrow ones.
    """

    name: str
    model: str
    config: str
    settings: Settings
    batch: Batch
    padded: bool = True
    truth: torch.dtype = torch.float64

    def make(self, size: Size = TINY, *, dropout: float = 0.0) -> nn.Module:
        """The model in training mode. All its values are random, and large enough that every layer changes the loss."""
        import transformers

        config = getattr(transformers, self.config)(**self.settings(size, dropout))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config)
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    nn.init.normal_(parameter, parameter.mean().item(), 0.1)
                else:
                    nn.init.normal_(parameter, 0.0, size.hidden**-0.5)
        return model.train()


def text(size: Size, padding: str | None) -> dict[str, Tensor]:
    """Tokens, labels and, for a padded batch, a mask: each sequence but the first has a third of its tokens padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, size.vocabulary, (size.batch, size.tokens), generator=generator)  # 0 and 1 are special
    mask = real_tokens(size, padding)
    labels = ids.masked_fill(~mask, IGNORED)
    batch = {"input_ids": ids, "labels": labels}
    return batch if padding is None else batch | {"attention_mask": mask.long()}


def real_tokens(size: Size, padding: str | None) -> Tensor:
    """Which tokens are no padding, (B, T)."""
    mask = torch.ones(size.batch, size.tokens, dtype=torch.bool)
    third = size.tokens // 3
    if padding == "left":
        mask[1:, :third] = False
    elif padding == "right":
        mask[1:, -third:] = False
    return mask


def images(size: Size, padding: str | None) -> dict[str, Tensor]:
    pixels = torch.randn(size.batch, 3, size.image, size.image, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.arange(size.batch) % LABELS}


def speech(size: Size, padding: str | None) -> dict[str, Tensor]:
    """The mask is that of the decoder's tokens: the encoder has none."""
    words = text(size, padding)
    found = {"decoder_input_ids": words["input_ids"], "labels": words["labels"]}
    found["input_features"] = torch.randn(size.batch, 16, size.frames, generator=torch.Generator().manual_seed(2))
    return found if padding is None else found | {"decoder_attention_mask": words["attention_mask"]}


_TOKENS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}


def _decoder(size: Size, dropout: float) -> dict[str, Any]:
    """The fields that the Llama family shares: grouped heads, dropout in attention alone."""
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": 2 * size.tokens,
        "attention_dropout": dropout,
        "use_cache": False,
        **_TOKENS,
    }


def _with_heads(size: Size, dropout: float) -> dict[str, Any]:
    return _decoder(size, dropout) | {"head_dim": size.head}


def _windowed(size: Size, dropout: float) -> dict[str, Any]:
    return _with_heads(size, dropout) | {"sliding_window": size.tokens // 2}


def _gemma(size: Size, dropout: float) -> dict[str, Any]:
    """Layers with a sliding window and full ones in turns."""
    return _windowed(size, dropout) | {
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(size.layers)]
    }


def _phi3(size: Size, dropout: float) -> dict[str, Any]:
    return _decoder(size, dropout) | {"resid_pdrop": dropout, "embd_pdrop": dropout}


def _mixtral(size: Size, dropout: float) -> dict[str, Any]:
    experts = {"num_local_experts": size.experts, "num_experts_per_tok": size.experts_per_token}
    return _with_heads(size, dropout) | experts | {"output_router_logits": True}


def _qwen3_moe(size: Size, dropout: float) -> dict[str, Any]:
    experts = {"num_experts": size.experts, "num_experts_per_tok": size.experts_per_token}
    return _with_heads(size, dropout) | experts | {"moe_intermediate_size": size.intermediate // 2}


def _gpt2(size: Size, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "n_embd": size.hidden,
        "n_inner": size.intermediate,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_positions": 2 * size.tokens,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
        "use_cache": False,
        **_TOKENS,
    }


def _opt(size: Size, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "word_embed_proj_dim": size.hidden,
        "ffn_dim": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "max_position_embeddings": 2 * size.tokens,
        "dropout": dropout,
        "attention_dropout": dropout,
        "use_cache": False,
        **_TOKENS,
    }


def _encoder(size: Size, dropout: float) -> dict[str, Any]:
    """The fields that BERT, RoBERTa, ViT and DINOv2 share."""
    return {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }


def _bert(size: Size, dropout: float) -> dict[str, Any]:
    return _encoder(size, dropout) | {
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2 * size.tokens,
        **_TOKENS,
    }


def _vit(size: Size, dropout: float) -> dict[str, Any]:
    return _encoder(size, dropout) | {"image_size": size.image, "patch_size": size.patch, "num_labels": LABELS}


def _dinov2(size: Size, dropout: float) -> dict[str, Any]:
    return _vit(size, dropout) | {"mlp_ratio": size.intermediate // size.hidden}


def _t5(size: Size, dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "d_model": size.hidden,
        "d_kv": size.head,
        "d_ff": size.intermediate,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "dropout_rate": dropout,
        "decoder_start_token_id": 0,
        "use_cache": False,
        **_TOKENS,
    }


def _whisper(size: Size, dropout: float) -> dict[str, Any]:
    both = {"layers": size.layers, "attention_heads": size.heads, "ffn_dim": size.intermediate}
    return {
        "vocab_size": size.vocabulary,
        "d_model": size.hidden,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in both.items()},
        "num_mel_bins": 16,
        "max_source_positions": size.frames // 2,
        "max_target_positions": 2 * size.tokens,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout),
        "decoder_start_token_id": 0,
        "use_cache": False,
        **_TOKENS,
    }


def _row(name: str, model: str, config: str, settings: Settings, batch: Batch = text, **more: Any) -> Architecture:
    return Architecture(name=name, model=model, config=config, settings=settings, batch=batch, **more)


# The grouped product of all experts takes no fp64. In Gemma2, a softmax in fp32 makes NaN of fp64's lowest number.
_fp32_row = partial(_row, truth=torch.float32)
_image_row = partial(_row, batch=images, padded=False)

ARCHITECTURES = (
    _row("Llama", "LlamaForCausalLM", "LlamaConfig", _decoder),
    _row("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", _with_heads),
    _row("Mistral", "MistralForCausalLM", "MistralConfig", _windowed),
    _fp32_row("Gemma2", "Gemma2ForCausalLM", "Gemma2Config", _gemma),
    _row("Gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", _gemma),
    _row("Phi-3", "Phi3ForCausalLM", "Phi3Config", _phi3),
    _fp32_row("Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _qwen3_moe),
    _fp32_row("Mixtral", "MixtralForCausalLM", "MixtralConfig", _mixtral),
    _row("GPT-2", "GPT2LMHeadModel", "GPT2Config", _gpt2),
    _row("OPT", "OPTForCausalLM", "OPTConfig", _opt),
    _row("BERT", "BertForMaskedLM", "BertConfig", _bert),
    _row("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", _bert),
    _row("T5", "T5ForConditionalGeneration", "T5Config", _t5),
    _image_row("ViT", "ViTForImageClassification", "ViTConfig", _vit),
    _image_row("DINOv2", "Dinov2ForImageClassification", "Dinov2Config", _dinov2),
    _row("Whisper", "WhisperForConditionalGeneration", "WhisperConfig", _whisper, speech),
)
