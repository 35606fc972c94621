"""Trainer of transformers: trains values alone, and resumes to the same bits as a run without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import memsave

from .shira import config, indices, layers, llama, same, tokens, values, weights

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
PROJECTIONS = ["q_proj", "down_proj"]
ROWS = [{name: ids[0] for name, ids in tokens(seed).items()} for seed in range(8)]


def wrapped() -> Any:
    return peft.get_peft_model(llama(), config(target_modules=PROJECTIONS))


def in_place() -> Any:
    model = llama()
    memsave.convert_model(model, config(target_modules=PROJECTIONS))
    return model


def trainer(model: Any, folder: Path, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 5e-2,
            "logging_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=ROWS)


@pytest.mark.parametrize("make", [wrapped, in_place])
@pytest.mark.parametrize(
    "settings",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}],
    ids=["fp32", "bf16", "checkpointing", "accumulation"],
)
def test_training(make: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    model = make()
    before = [layer.held.original_weight() for layer in layers(model)]
    run = trainer(model, tmp_path, **settings)
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.003
    for layer, original in zip(layers(model), before, strict=True):
        held = layer.base_layer.weight.detach()
        assert torch.equal(layer.held.original_weight(), original)
        expected = original.flatten()[indices(layer)] + layer.memsave_shira_values["default"].detach()
        assert torch.equal(held.flatten()[indices(layer)], expected) and not torch.equal(held, original)
        assert torch.equal((held != original).flatten().nonzero()[:, 0], indices(layer))


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """The same values with and without it, from the same data."""
    found = []
    for settings in ({}, {"gradient_checkpointing": True}):
        model = wrapped()
        trainer(model, tmp_path, **settings).train()
        found.append(values(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_resuming_gives_the_values_of_a_run_without_a_break(tmp_path: Path) -> None:
    whole = wrapped()
    trainer(whole, tmp_path / "whole", save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "whole" / "checkpoint-2"
    assert not list(folder.glob("model*.safetensors")) and (folder / "adapter_model.safetensors").is_file()
    resumed = wrapped()
    trainer(resumed, tmp_path / "resumed").train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(a, b) for a, b in zip(values(resumed), values(whole), strict=True))
    assert same(weights(resumed), weights(whole)) and not same(weights(whole), weights(wrapped()))
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "whole" / "checkpoint-4"))
    batch = tokens()
    assert torch.equal(again(**batch).logits, whole(**batch).logits)
