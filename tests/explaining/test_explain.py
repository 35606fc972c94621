"""explain: every kept byte has a cause, and the predictions are those of estimate.

B sequences of T tokens, N of them together; d features, F in an MLP, V classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memsave
from memsave.explaining.causes import Cause

from ..architectures.models import ARCHITECTURES, TINY, Architecture

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra hf)")

B, T, D, F, V, LAYERS = 2, 24, 32, 80, 50, 3
N = B * T
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "use_cache": False,
}


def llama(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **settings})).train()


def batch(shape: tuple[int, int] = (B, T)) -> dict[str, Tensor]:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % V
    return {"input_ids": ids, "labels": ids}


def by_cause(explanation: memsave.Explanation) -> dict[str, int]:
    return {kept.cause: kept.kept_bytes for kept in explanation.causes}


def test_the_bytes_of_a_llama_are_those_of_its_formula() -> None:
    found = by_cause(memsave.explain(llama(), batch(), optimizer=None))
    norms = 2 * LAYERS + 1
    assert found[Cause.MLP] == LAYERS * 4 * N * F * 4  # gate, act(gate), up, and what down reads
    assert found[Cause.NORM_OUTPUTS] == norms * N * D * 4
    assert found[Cause.NORMS] == norms * (2 * N * D + N) * 4  # input, normalized input, reciprocal root mean square
    assert found[Cause.LOGITS] >= N * V * 4
    assert found[Cause.EMBEDDINGS] == N * 8


SHOWN = ("Gemma3", "Mixtral", "GPT-2", "BERT", "T5", "ViT", "Whisper")


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.name in SHOWN], ids=lambda a: a.name)
def test_every_kept_byte_has_a_cause(architecture: Architecture) -> None:
    model = architecture.make(dropout=0.1)
    given = architecture.batch(TINY, "left" if architecture.padded else None)
    explanation = memsave.explain(model, given, optimizer=None)
    plain = memsave.estimate(model, given)
    assert explanation.profile == plain
    for rows in (explanation.causes, explanation.modules):
        assert sum(row.kept_bytes for row in rows) == plain.saved_bytes
    named = sum(size for cause, size in by_cause(explanation).items() if cause != Cause.OTHER)
    assert named >= 0.8 * plain.saved_bytes
    memsave.convert_model(model)
    after = memsave.estimate(model, given)
    for rows in (explanation.causes, explanation.modules):
        assert sum(row.converted_bytes or 0 for row in rows) == after.saved_bytes
    kept = {option.change: (option.kept_bytes, option.peak_bytes, option.phase) for option in explanation.options}
    assert kept["as it is"] == (plain.saved_bytes, plain.peak_bytes, plain.phase)
    assert kept["memsave.convert_model(model)"] == (after.saved_bytes, after.peak_bytes, after.phase)


def test_changes_are_predicted_as_estimate_does() -> None:
    explanation = memsave.explain(llama(), batch(), optimizer="sgd")
    predicted = {option.change: option.peak_bytes for option in explanation.options}

    checkpointed = llama()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    assert predicted["activation checkpointing"] == memsave.estimate(checkpointed, batch(), optimizer="sgd").peak_bytes
    everything = llama()
    memsave.convert_model(everything)
    memsave.convert_model(everything, memsave.RecomputeMLPConfig(recompute="all"))
    label = '... then RecomputeMLPConfig(recompute="all")'
    assert predicted[label] == memsave.estimate(everything, batch(), optimizer="sgd").peak_bytes


def test_the_methods_that_free_bytes_are_named() -> None:
    explanation = memsave.explain(llama(), batch(), optimizer=None)
    methods = {kept.cause: kept.methods for kept in explanation.causes}
    assert "recompute_norm" in methods[Cause.NORMS] and "recompute_mlp" in methods[Cause.MLP]
    for kept in (*explanation.causes, *explanation.modules):
        assert not kept.methods or (kept.converted_bytes or 0) < kept.kept_bytes


def test_modules_are_grouped_by_what_keeps_the_bytes() -> None:
    rows = {(row.modules, row.cause): row.count for row in memsave.explain(llama(), batch(), optimizer=None).modules}
    assert rows["model.layers.{0-2}.mlp", Cause.MLP] == LAYERS
    assert rows["model.layers.{0-2}.self_attn", Cause.ATTENTION] == LAYERS
    assert rows["model.layers.{0-2}.{self_attn,mlp}", Cause.NORM_OUTPUTS] == 2 * LAYERS


def test_checkpointed_modules_keep_their_inputs() -> None:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = by_cause(memsave.explain(model, batch(), optimizer=None))
    assert found[Cause.CHECKPOINTS] >= LAYERS * N * D * 4
    assert Cause.MLP not in found and Cause.ATTENTION not in found


def test_a_converted_model_is_explained_as_it_is() -> None:
    model = llama()
    memsave.convert_model(model)
    explanation = memsave.explain(model, batch())
    assert explanation.profile == memsave.estimate(model, batch(), optimizer="adamw")
    assert all(row.kept_bytes == row.converted_bytes for row in explanation.causes)


def test_a_model_of_no_library() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    explanation = memsave.explain(model, torch.randn(2, 3, 8, 8), optimizer=None)
    found = by_cause(explanation)
    assert found[Cause.CONVOLUTIONS] == 2 * 3 * 8 * 8 * 4
    assert set(found) == {Cause.CONVOLUTIONS, Cause.NORMS, Cause.LINEARS}
    assert [option.change for option in explanation.options][0] == "as it is"


def test_nothing_to_convert_is_left_out() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale) ** 2

    explanation = memsave.explain(Square(), torch.ones(3, 4))
    assert len(explanation.options) == 1
    assert all(kept.converted_bytes is None for kept in explanation.causes)
    assert "->" not in str(explanation)


def test_the_model_stays_as_it_is(unchanged: Callable[[nn.Module], nn.Module]) -> None:
    model = unchanged(llama().eval())
    state = torch.get_rng_state()
    memsave.explain(model, batch(), optimizer=None)
    assert torch.equal(torch.get_rng_state(), state)


def test_text_and_data_say_the_same() -> None:
    explanation = memsave.explain(llama(), batch())
    text, data = str(explanation), json.loads(explanation.to_json())
    assert data["model"] == "LlamaForCausalLM" and data["causes"][0]["cause"] in text
    for option in data["options"]:
        assert option["change"] in text
    for trap in data["traps"]:
        assert trap["name"] in text
    assert "(other modules)" in explanation.table(modules=2) and "(other modules)" not in explanation.table(modules=99)


def test_a_step_that_fails_is_refused_as_by_estimate() -> None:
    with pytest.raises(memsave.EstimateError, match="fails on this batch"):
        memsave.explain(llama(), {"input_ids": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="optimizer 'no' is unknown"):
        memsave.explain(llama(), batch(), optimizer="no")
