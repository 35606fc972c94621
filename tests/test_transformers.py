"""Models of transformers, tiny and with random weights: convert, train, checkpoint, save, restore."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave import WTACRSConfig
from memsave.config import applied_configs

from .snapshot import bits, snapshot

# Its replacement does not exist in the oldest version that is supported.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
hf = pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")

VOCABULARY, BATCH, TOKENS = 48, 2, 24
LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = {**LLAMA_LIKE, "num_key_value_heads": 2}
EVERY_LINEAR = WTACRSConfig(keep_ratio=0.25, min_rows=4, target_modules=r".*")


def text() -> dict[str, Tensor]:
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def images() -> dict[str, Tensor]:
    pixels = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers with a tiny config.

    Attributes:
        model, config, settings: class names in transformers, and the config's fields.
        converted: how many modules bare `convert_model` converts.
        norm: class name of the norms.
        attention: whether it has layers that can share a mask; then the model itself counts as converted, too.
        left: all that is left but embeddings and convolutions, as (pattern, class, the reason's beginning).
        batch: makes a training batch.
    """

    model: str
    config: str
    settings: dict[str, Any]
    converted: int
    norm: str
    attention: bool = True
    left: tuple[tuple[str, str, str], ...] = ()
    batch: Callable[[], dict[str, Tensor]] = text

    def plain(self) -> Any:
        return copy.deepcopy(_made(self.model))

    def saves(self) -> bool:
        """Whether its norms are converted."""
        return not any(kind == self.norm for _, kind, _ in self.left)


@cache
def _made(name: str) -> Any:
    """The model, in training mode, with random weights also where transformers starts with ones and zeros."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, name)(getattr(hf, architecture.config)(**architecture.settings))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, parameter.mean().item(), 0.1)
    return model.train()


_LIST = [
    Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **{"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0},
        },
        converted=25,
        norm="LayerNorm",
    ),
    Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
            **{"dropout_rate": 0.0, "decoder_start_token_id": 0},
        },
        converted=65,
        norm="T5LayerNorm",
    ),
    Architecture(
        "BertForMaskedLM",
        "BertConfig",
        {**LLAMA_LIKE, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        converted=30,
        norm="LayerNorm",
        left=(("cls.predictions", "BertLMPredictionHead", "not a kind"),),
    ),
    Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED, converted=24, norm="LlamaRMSNorm"),
    Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        converted=20,
        norm="Qwen3MoeRMSNorm",
        left=(
            ("model.layers.{0-1}.mlp.experts", "Qwen3MoeExperts", "holds 3-D parameters"),
            ("model.layers.{0-1}.mlp.gate", "Qwen3MoeTopKRouter", "not a kind"),
        ),
    ),
    Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {
            **{"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
            **{"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0},
        },
        converted=14,
        norm="MambaRMSNorm",
        attention=False,
        left=(("backbone.layers.{0-1}.mixer", "MambaMixer", "not a kind"),),
    ),
    Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
            **{"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        },
        converted=25,
        norm="LayerNorm",
        left=(("vit.embeddings", "ViTEmbeddings", "holds 3-D parameters"),),
        batch=images,
    ),
    Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 8, "sliding_window": 8},
        converted=32,
        norm="Gemma3RMSNorm",
    ),
    Architecture("Phi3ForCausalLM", "Phi3Config", GROUPED, converted=22, norm="Phi3RMSNorm"),
    Architecture("Olmo2ForCausalLM", "Olmo2Config", GROUPED, converted=28, norm="Olmo2RMSNorm"),
]
ARCHITECTURES = {architecture.model: architecture for architecture in _LIST}
architectures = pytest.mark.parametrize("architecture", _LIST, ids=[a.model for a in _LIST])


def train(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within fp32 rounding, relative to the largest entry of each."""
    assert list(actual) == list(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        assert (actual[name] - gradient).abs().max().item() <= 2e-5 * scale + 1e-9, name


def sampled_weights(model: nn.Module) -> set[str]:
    """Names of the weights whose gradients are sampled."""
    return {f"{name}.weight" for name, m in model.named_modules() if "wta_crs" in applied_configs(m)}


@architectures
def test_bare_conversion_trains_the_same_model_in_less_memory(architecture: Architecture) -> None:
    plain, model, batch = architecture.plain(), architecture.plain(), architecture.batch()
    memsave.convert_model(model)
    (loss, gradients), (plain_loss, plain_gradients) = train(model, batch), train(plain, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert_gradients_close(gradients, plain_gradients)
    kept = memsave.saved_bytes(lambda: model(**batch))
    plain_kept = memsave.saved_bytes(lambda: plain(**batch))
    assert kept < plain_kept if architecture.saves() else kept == plain_kept


@architectures
def test_evaluation_gives_the_same_bits(architecture: Architecture) -> None:
    plain, model, batch = architecture.plain().eval(), architecture.plain().eval(), architecture.batch()
    memsave.convert_model(model)
    memsave.convert_model(model, EVERY_LINEAR)
    with torch.no_grad():
        assert bits(model(**batch).logits) == bits(plain(**batch).logits)


@architectures
def test_the_report_names_all_that_was_converted_and_all_that_was_left(architecture: Architecture) -> None:
    model = architecture.plain()
    report = memsave.convert_model(model)
    assert report.count == architecture.converted + architecture.attention
    assert (architecture.norm in {row.kind for row in report.rows}) == architecture.saves()
    others = {s.modules for s in report.skipped if not s.kind.endswith(("Embedding", "Conv1d", "Conv2d"))}
    assert others == {pattern for pattern, _, _ in architecture.left}
    for pattern, kind, reason in architecture.left:
        (skip,) = (s for s in report.skipped if s.modules == pattern)
        assert skip.kind == kind and skip.reason.startswith(reason)
        own = sum(p.nbytes for name in skip.names for p in model.get_submodule(name).parameters(recurse=False))
        assert skip.share == pytest.approx(own / sum(p.nbytes for p in model.parameters()))
        assert f"{skip.share:.1%}" in str(report) and pattern in str(report)


def test_experts_are_the_first_thing_that_the_report_names_as_left() -> None:
    report = memsave.convert_model(ARCHITECTURES["Qwen3MoeForCausalLM"].plain())
    assert report.skipped[0].kind == "Qwen3MoeExperts" and report.skipped[0].share > 0.5


@architectures
def test_sampling_every_linear_changes_weight_gradients_only(architecture: Architecture) -> None:
    plain, model, batch = architecture.plain(), architecture.plain(), architecture.batch()
    memsave.convert_model(model, EVERY_LINEAR)
    (loss, gradients), (plain_loss, expected) = train(model, batch), train(plain, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    sampled = sampled_weights(model)
    assert sampled
    others = [name for name in expected if name not in sampled and not _is_tied(model, name, sampled)]
    assert_gradients_close({n: gradients[n] for n in others}, {n: expected[n] for n in others})
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    changed = [n for n in sampled & set(expected) if not torch.allclose(gradients[n], expected[n], rtol=1e-3)]
    assert len(changed) > len(sampled) / 2
    assert memsave.saved_bytes(lambda: model(**batch)) < memsave.saved_bytes(lambda: plain(**batch))


def _is_tied(model: Any, name: str, sampled: set[str]) -> bool:
    """Whether the parameter is that of an output head, too, which is sampled."""
    tied = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if n in sampled}
    return id(model.get_parameter(name)) in tied


@architectures
def test_restoring_gives_back_every_bit(architecture: Architecture) -> None:
    model = architecture.plain()
    before = snapshot(model)
    memsave.convert_model(model)
    memsave.convert_model(model, EVERY_LINEAR)
    assert snapshot(model)["modules"] != before["modules"]
    memsave.restore_model(model)
    assert snapshot(model) == before


@architectures
def test_saved_models_load_into_the_stock_class(architecture: Architecture, tmp_path: Path) -> None:
    model = architecture.plain()
    memsave.convert_model(model)
    memsave.convert_model(model, EVERY_LINEAR)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert not any(applied_configs(module) for module in loaded.modules())
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert list(mine) == list(theirs)
    assert [name for name in mine if bits(mine[name]) != bits(theirs[name])] == []


@architectures
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_gives_the_same_gradients(architecture: Architecture, use_reentrant: bool) -> None:
    plain, model, batch = architecture.plain(), architecture.plain(), architecture.batch()
    if not model.supports_gradient_checkpointing:
        pytest.skip("transformers does not checkpoint this model")
    memsave.convert_model(model)
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    (loss, gradients), (plain_loss, plain_gradients) = train(model, batch), train(plain, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert_gradients_close(gradients, plain_gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_sampling_under_checkpointing_gives_the_gradients_of_sampling_alone(use_reentrant: bool) -> None:
    model, batch = ARCHITECTURES["LlamaForCausalLM"].plain(), text()
    memsave.convert_model(model)
    memsave.convert_model(model, EVERY_LINEAR)
    alone = train(model, batch)[1]
    alone = {name: gradient.clone() for name, gradient in alone.items()}
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_gradients_close(train(model, batch)[1], alone)


def test_generation_works_and_gives_the_same_tokens() -> None:
    plain, model = (ARCHITECTURES["LlamaForCausalLM"].plain().eval() for _ in range(2))
    memsave.convert_model(model)
    memsave.convert_model(model, EVERY_LINEAR)
    prompt = text()["input_ids"][:, :4]
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **arguments), plain.generate(prompt, **arguments))


def test_the_root_and_every_pretrained_model_keep_their_class() -> None:
    model = ARCHITECTURES["LlamaForCausalLM"].plain()
    memsave.convert_model(model)
    assert type(model) is hf.LlamaForCausalLM and type(model.model) is hf.LlamaModel
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_trainers_still_find_the_norms_to_leave_without_weight_decay() -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    forbidden = [nn.LayerNorm]
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    for name in ("GPT2LMHeadModel", "LlamaForCausalLM"):
        plain, model = ARCHITECTURES[name].plain(), ARCHITECTURES[name].plain()
        memsave.convert_model(model)
        assert get_parameter_names(model, forbidden, patterns) == get_parameter_names(plain, forbidden, patterns)


def test_new_weights_are_initialized_as_in_the_plain_model() -> None:
    models = [ARCHITECTURES["LlamaForCausalLM"].plain() for _ in range(2)]
    memsave.convert_model(models[1])
    for model in models:
        torch.manual_seed(3)
        for parameter in model.parameters():
            parameter.data.fill_(7.0)
        for module in model.modules():
            module._is_hf_initialized = False
            model._init_weights(module)
    assert [bits(p) for p in models[0].parameters()] == [bits(p) for p in models[1].parameters()]
    assert (models[1].model.norm.weight == 1).all() and (models[1].lm_head.weight != 7).any()
