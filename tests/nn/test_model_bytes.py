"""What a whole model keeps for backward, per token and layer: only whole models count, since neighbours share tensors.

d hidden size, f intermediate size, h heads. Plain Llama in fp32: 10d + 4f + h + 2 elements, of which each of the two
norms keeps its input, xhat and its output. Converted: the two norms' inputs, q, k, v and the output of attention, gate
and up, and a number per norm and head in fp32. k heads for keys and values.
"""

from __future__ import annotations

import pytest
import torch

import memsave

transformers = pytest.importorskip("transformers", reason="the models come from transformers (extra: hf)")

D, F, HEADS, KV_HEADS, TOKENS = 32, 88, 4, 2, 2 * 24


def kept_bytes(model: torch.nn.Module) -> int:
    ids = torch.arange(TOKENS).view(2, -1) % 50
    return memsave.saved_bytes(lambda: model(input_ids=ids, labels=ids).loss)


def kept_per_layer(*configs: memsave.MethodConfig, dtype: torch.dtype = torch.float32) -> float:
    """Bytes per token that one more layer keeps; `configs` None means the plain model."""
    totals = []
    for layers in (2, 3):
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=D, intermediate_size=F, num_hidden_layers=layers, num_attention_heads=HEADS
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(dtype)
        for method in configs:
            memsave.convert_model(model, method)
        totals.append(kept_bytes(model))
    return (totals[1] - totals[0]) / TOKENS


def test_a_llama_layer_keeps_no_norm_output() -> None:
    plain, ours = kept_per_layer(), kept_per_layer(memsave.RecomputeNormConfig())
    copies_of_weights = 2 * D / TOKENS
    assert plain >= 4 * (10 * D + 4 * F + HEADS)
    assert ours <= 4 * (6 * D + 4 * F + HEADS + 2 + copies_of_weights)


def test_a_bf16_llama_layer_keeps_nothing_upcast() -> None:
    plain = kept_per_layer(dtype=torch.bfloat16)
    ours = kept_per_layer(memsave.RecomputeNormConfig(), dtype=torch.bfloat16)
    assert plain >= 2 * (12 * D + 4 * F)
    assert ours <= 2 * (6 * D + 4 * F + 2 * HEADS + 4 + 2 * D / TOKENS)


def layers_kept(dtype: torch.dtype, *conversions: memsave.MethodConfig | None, padded: bool) -> float:
    """Elements per token that one more layer of a Llama with grouped heads keeps, after calls of convert_model."""
    totals = []
    for layers in (2, 3):
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=D,
            intermediate_size=F,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
        )
        model = transformers.LlamaModel(config).to(dtype)
        for configs in conversions:
            memsave.convert_model(model, configs)
        x = torch.randn(2, TOKENS // 2, D).to(dtype).requires_grad_()
        mask = torch.ones(2, TOKENS // 2, dtype=torch.int64)
        mask[1, :5] = 0
        batch = {"inputs_embeds": x, "attention_mask": mask if padded else None, "use_cache": False}
        totals.append(memsave.saved_bytes(lambda model=model, batch=batch: model(**batch).last_hidden_state))
    return (totals[1] - totals[0]) / TOKENS / dtype.itemsize


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_llama_layer_keeps_exactly_what_it_must(dtype: torch.dtype, padded: bool) -> None:
    """(4 + 2 k/h) d + 2f, and (h + 2) numbers in fp32; the mask once per model; recompute="all" without 2f."""
    copies_of_weights = 2 * D / TOKENS
    must = (4 + 2 * KV_HEADS / HEADS) * D + (HEADS + 2) * 4 / dtype.itemsize + copies_of_weights
    everything = memsave.RecomputeMLPConfig(recompute="all")
    assert layers_kept(dtype, None, padded=padded) == pytest.approx(must + 2 * F, abs=1e-9)
    assert layers_kept(dtype, None, everything, padded=padded) == pytest.approx(must, abs=1e-9)


def test_without_grouped_heads_half_of_the_bytes_are_left() -> None:
    """At f = 2.75 d: 0.55 of plain's in fp32, 0.50 in bf16, where plain norms keep copies in fp32."""
    large, tokens = 256, 64

    def kept(dtype: torch.dtype, converted: bool) -> int:
        totals = []
        for layers in (1, 2):
            config = transformers.LlamaConfig(
                hidden_size=large, intermediate_size=704, num_hidden_layers=layers, num_attention_heads=4, vocab_size=50
            )
            model = transformers.LlamaModel(config).to(dtype)
            if converted:
                memsave.convert_model(model)
            x = torch.randn(1, tokens, large).to(dtype).requires_grad_()
            totals.append(memsave.saved_bytes(lambda model=model, x=x: model(inputs_embeds=x, use_cache=False)[0]))
        return totals[1] - totals[0] - (2 * large * dtype.itemsize if converted else 0)  # copies of weights, once

    for dtype, bound in ((torch.float32, 0.56), (torch.bfloat16, 0.51)):
        assert kept(dtype, True) <= bound * kept(dtype, False)


def test_sampling_keeps_rows_of_what_no_norm_made_and_no_rows_of_what_one_made() -> None:
    """Of the inputs of the seven linears only down_proj's is not kept by a neighbour: sampling thins that one out."""
    exact = memsave.RecomputeNormConfig()
    sampled = memsave.WTACRSConfig(keep_ratio=0.25, min_rows=1, target_modules=r".*_proj")
    saved = kept_per_layer(exact) - kept_per_layer(exact, sampled)
    rows = 0.25
    draws = 4 * 8 * rows + 4 * (3 * D + F) / TOKENS  # q/k/v, o, gate/up, down: index and scale of each row, poison
    added_for_o_proj = 4 * D * rows  # its input stays with SDPA, too
    assert saved >= 4 * F * (1 - rows) - draws - added_for_o_proj - 1e-9


def test_only_the_input_of_down_proj_is_worth_sampling_for_its_bytes() -> None:
    """The norms' outputs are recomputed anyway, and attention keeps o_proj's input: sampling these frees nothing."""

    def kept(targets: list[str]) -> float:
        config = memsave.WTACRSConfig(keep_ratio=0.25, min_rows=1, target_modules=targets)
        return kept_per_layer(memsave.RecomputeNormConfig(), config)

    down = kept(["down_proj"])
    assert down < kept_per_layer(memsave.RecomputeNormConfig())
    assert down <= kept(["down_proj", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
    assert down < kept(["down_proj", "o_proj"])
