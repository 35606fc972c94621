"""What the general rules cannot know: settings and inputs of single model types."""

from __future__ import annotations

from typing import Any

import torch

_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_UPSAMPLE = {"upsample_groups": 64, "codebook_dim": 32, "vector_quantization_hidden_dimension": 32}
_VQGAN = {"base_channels": 32, "channel_multiplier": (1, 1), "num_res_blocks": 1, "latent_channels": 32}
_AXES = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA_HEADS | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA_HEADS | {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 8},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16, "chunk_size": 16},
    "dots1": _EXPERTS,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr_text": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]},
    "nemotron": {"num_key_value_heads": 4},
    "esm": {"vocab_size": 40, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl_text": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 160,
    },
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "glm5_next_text": {"index_topk": 16, "index_kpool": 4},
    "gpt_neo": {
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
    },
    "cvt": {"embed_dim": (16, 48, 96), "depth": (1, 1, 1)},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 160},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"global_head_dim": 16, "num_kv_shared_layers": 0},
    "diffusion_gemma_text": {"global_head_dim": 16, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "moonshine_streaming_encoder": {"sliding_windows": [[16, 4], [16, 0]]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": _AXES | {"mrope_section": [3, 3, 2]},
    },
    "mimi": _UPSAMPLE,
    "csm_depth_decoder_model": {"num_codebooks": 8},
    "janus_vqgan": _VQGAN,
    "chameleon_vqgan": _VQGAN | {"attn_resolutions": None},
    "emu3_vqgan": _VQGAN | {"attn_resolutions": None},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "bit": {"num_groups": 4},
    "xmod": {"default_language": "en_XX"},
    "xlnet": {"d_head": 16},
    "swin2sr": {"window_size": 4},
    "mobilevit": {"num_attention_heads": 2},
    "granite4_vision": {},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "depth_pro": {"patch_size": 64},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "musicgen": {},
    "step3p5": {"sliding_window": 8},
    "zamba": {"num_hidden_layers": 3},
    "pix2struct_text_model": {},
    "bark": {},
    "align_vision_model": {
        "hidden_dim": 64,
        "num_block_repeats": [1] * 7,
        "in_channels": [32, 16, 16, 16, 16, 16, 16],
        "out_channels": [16] * 7,
    },
    "efficientnet": {
        "hidden_dim": 64,
        "num_block_repeats": [1] * 7,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "in_channels": [32, 16, 16, 16, 16, 16, 16],
        "out_channels": [16] * 7,
    },
}
"""Fields of a config, by its `model_type`; with "@small", where all widths are alike; with "@default", to make it."""


def _series(maker: Any) -> dict[str, Any]:
    """Past and future values, whose lags reach further back than the context."""
    length = maker.config.context_length + max(maker.config.lags_sequence)
    future = maker.config.prediction_length
    times = max(1, maker.config.num_time_features)
    return {
        "past_values": maker.floats(2, length),
        "past_time_features": maker.floats(2, length, times),
        "past_observed_mask": torch.ones(2, length),
        "future_values": maker.floats(2, future),
        "future_time_features": maker.floats(2, future, times),
    }


def _codebooks(maker: Any) -> dict[str, Any]:
    """Codes of several codebooks, in rows of their own."""
    count = maker.find("num_codebooks", default=2)
    return {"input_ids": maker.integers(0, 60, 2 * count, 16)}


def _patches(maker: Any) -> list[dict[str, Any]]:
    """Images in flat patches, each with its row and column in front."""
    width = maker.find("patch_embed_hidden_size", default=768)
    rows = torch.arange(1, 17).float()[None, :, None].expand(2, -1, 2) % 4
    made: dict[str, Any] = {"flattened_patches": torch.cat((rows, maker.floats(2, 16, width)), -1)}
    words = maker.words(12)
    return [made | {"decoder_input_ids": words, "labels": words}, made]


def _regions(maker: Any) -> dict[str, Any]:
    """Words with features and places of image regions."""
    made = {"input_ids": maker.words(), "visual_feats": maker.floats(2, 6, maker.config.visual_feat_dim)}
    return made | {"visual_pos": maker.floats(2, 6, 4)}


def _pairs(maker: Any) -> dict[str, Any]:
    return {"pixel_values": maker.floats(2, 2, 1 if "LightGlue" not in type(maker.model).__name__ else 3, 64, 64)}


def _speech(maker: Any) -> dict[str, Any]:
    words = maker.words(12)
    return {"input_values": maker.floats(2, 4000), "decoder_input_ids": words, "labels": words}


def _spectrogram(maker: Any) -> dict[str, Any]:
    return {"input_values": maker.floats(2, maker.config.max_length, maker.config.num_mel_bins)}


def _decisions(maker: Any) -> dict[str, Any]:
    c, steps = maker.config, 8
    return {
        "states": maker.floats(2, steps, c.state_dim),
        "actions": maker.floats(2, steps, c.act_dim),
        "rewards": maker.floats(2, steps, 1),
        "returns_to_go": maker.floats(2, steps, 1),
        "timesteps": torch.arange(steps).expand(2, -1),
        "attention_mask": torch.ones(2, steps, dtype=torch.long),
    }


INPUTS: dict[str, Any] = {
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "pix2struct": _patches,
    "pix2struct_vision_model": _patches,
    "kosmos_2_5_vision_model": _patches,
    "lxmert": _regions,
    "lightglue": _pairs,
    "superglue": _pairs,
    "efficientloftr": _pairs,
    "speech-encoder-decoder": _speech,
    "audio-spectrogram-transformer": _spectrogram,
    "decision_transformer": _decisions,
}
"""How to make the inputs (a dict, or several to try), by `model_type` or the class's name, from the `Maker`."""

VALUES_DECIDE_SHAPES = {"SLANetSLAHead"}
"""Classes that go on until they meet a certain token: other weights, another length."""
