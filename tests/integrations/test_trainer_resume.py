"""Checkpoints of a Trainer with MemsaveCallback: training goes on from them bit for bit; memsave.load reads them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import memsave
from memsave import (
    FlashSVDConfig,
    LaMDAConfig,
    MemsaveCallback,
    RecomputeMLPConfig,
    RoutedFFNConfig,
    SHiRAConfig,
    SparseMHAConfig,
    WTACRSConfig,
)

from .trainers import batch, llama, logged, trainer

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS, SAVED = 7, 3  # of an epoch that has five: the run goes on in the middle of an epoch, and into the next
SAVING = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
ROUTED = RoutedFFNConfig(balance_loss=0.1, target_modules=r".*\.mlp")
CACHED = WTACRSConfig(
    keep_ratio=0.3, min_rows=2, grad_norms="sample_cache", save_grad_norms=True, target_modules=["up_proj", "down_proj"]
)
LAMDA = {"r": 8, "target_modules": "all-linear", "freeze_until": 0.8}
SHIRA = {"density": 0.1, "target_modules": ["q_proj", "down_proj"]}


class WithSampleIds(transformers.Trainer):
    """What docs/training.md says of batches whose samples are remembered."""

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        with memsave.sample_ids(inputs.pop("ids")):
            return super().training_step(model, inputs, *rest)


def with_ids(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A collator; a sample is known by its tokens."""
    found = transformers.default_data_collator(samples)
    return {**found, "ids": found["input_ids"][:, 0] * 64 + found["input_ids"][:, 1]}


@dataclass(frozen=True)
class Case:
    """A model and what the callback makes of it.

    Attributes:
        keys: whether the checkpoint is memsave's.
        moves: names within those of the parameters and buffers that change in training.
    """

    convert: Callable[[], Any]
    make: Callable[[], Any] = llama
    settings: dict[str, Any] = field(default_factory=dict)
    keys: bool = False
    moves: tuple[str, ...] = ("q_proj",)


def dropout_llama() -> Any:
    return llama(attention_dropout=0.2)


def lora() -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1)
    return peft.get_peft_model(llama(), config)


SPARSE = SparseMHAConfig(
    keep=4, granularity="token", codebook="ema", num_subspaces=4, dense_below=8, target_modules=r".*self_attn"
)
CASES: dict[str, Case] = {
    "exact": Case(lambda: True, dropout_llama),
    "exact_no_dropout": Case(lambda: True),
    "accumulation": Case(lambda: True, dropout_llama, {"gradient_accumulation_steps": 2}),
    "wta_crs": Case(lambda: [True, WTACRSConfig(keep_ratio=0.3, min_rows=2, target_modules=["up_proj", "down_proj"])]),
    "sample_cache": Case(lambda: CACHED, settings={"kind": WithSampleIds, "remove_unused_columns": False}),
    "recompute_mlp": Case(lambda: RecomputeMLPConfig(recompute="all", keep_ratio=0.5, target_modules=r".*")),
    "lora": Case(lambda: True, lora, moves=("lora_A", "lora_B")),
    "lamda": Case(lambda: [LaMDAConfig(**LAMDA), True], keys=True, moves=("lamda_S", "lamda_B")),
    "lamda_peft": Case(
        lambda: True, lambda: peft.get_peft_model(llama(), LaMDAConfig(**LAMDA)), moves=("lamda_S", "lamda_B")
    ),
    "shira": Case(lambda: [SHiRAConfig(**SHIRA), True], keys=True, moves=("shira_values",)),
    "shira_peft": Case(
        lambda: True, lambda: peft.get_peft_model(llama(), SHiRAConfig(**SHIRA)), moves=("shira_values",)
    ),
    "routed_ffn": Case(lambda: [ROUTED, True], keys=True, moves=("router.weight", "up_weight")),
    # Steps of three batches and two: the run goes on before the second.
    "routed_accumulation": Case(lambda: ROUTED, settings={"gradient_accumulation_steps": 3}, keys=True),
    "sparse_mha": Case(lambda: SPARSE, keys=True, moves=("codebook",)),
    "flash_svd": Case(
        lambda: FlashSVDConfig(ratio=0.5, target_modules=r".*mlp.*"), llama, keys=True, moves=("up_proj",)
    ),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run(folder: Path, case: Case, **settings: Any) -> transformers.Trainer:
    given = {**SAVING, **case.settings, **settings}
    if "kind" in given:
        given["data_collator"] = with_ids
    return trainer(folder, case.make(), MemsaveCallback(case.convert(), report=False), **given)


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert list(one) == list(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


@cases
def test_a_resumed_run_is_the_run_that_was_never_stopped(case: Case, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", case)
    start = state(whole.model)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{SAVED}"
    assert (checkpoint / "memsave.json").is_file() == case.keys
    assert not list(checkpoint.glob("*.bin.index*")) and not (checkpoint / "pytorch_model.bin").exists()
    resumed = run(tmp_path / "resumed", case, save_strategy="no")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logged(resumed) == logged(whole) and len(logged(whole)) == STEPS
    assert differing(state(resumed.model), state(whole.model)) == []
    moved = [
        name for name, tensor in state(whole.model).items() if not torch.equal(tensor, start.get(name, tensor[:0]))
    ]
    assert all(any(part in name for name in moved) for part in case.moves)


class Interrupted(transformers.TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


@pytest.mark.parametrize("name", ["lamda", "routed_ffn", "sparse_mha"])
def test_true_resumes_from_the_latest_checkpoint(name: str, tmp_path: Path) -> None:
    whole, first = (run(tmp_path / part, CASES[name]) for part in ("whole", "parts"))
    first.add_callback(Interrupted())
    whole.train(), first.train()
    resumed = run(tmp_path / "parts", CASES[name])
    resumed.train(resume_from_checkpoint=True)
    assert len(logged(first)) == SAVED and logged(resumed) == logged(whole)
    assert differing(state(resumed.model), state(whole.model)) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.keys])
def test_memsave_loads_the_checkpoints_of_models_whose_keys_changed(name: str, tmp_path: Path) -> None:
    made = run(tmp_path, CASES[name], save_total_limit=1, max_steps=2 * SAVED)
    made.train()
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{2 * SAVED}"
    made.save_model(str(tmp_path / "model"))
    expected = made.model.eval()(**batch()).logits
    for folder in (checkpoint, tmp_path / "model"):
        loaded = memsave.load(folder)
        assert differing(state(loaded), state(made.model)) == []
        assert torch.equal(loaded.eval()(**batch()).logits, expected)


@pytest.mark.parametrize("name", ["lamda", "routed_ffn", "sparse_mha"])
def test_the_best_model_is_loaded_at_the_end(name: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    made = run(tmp_path, CASES[name], learning_rate=0.1, lr_scheduler_type="constant", max_steps=6, **settings)
    states: list[dict[str, Tensor]] = []

    class Watch(transformers.TrainerCallback):
        def on_save(self, *_: object, model: Any, **__: object) -> None:
            states.append(state(model))

    made.add_callback(Watch())
    made.train()
    losses = logged(made, "eval_loss")
    best = losses.index(min(losses))
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{2 * (best + 1)}")
    assert differing(state(made.model), states[best]) == []
    assert len(states) == 3 and differing(states[0], states[-1])


def test_the_place_of_save_pretrained_is_given_back(tmp_path: Path) -> None:
    made = run(tmp_path, CASES["routed_ffn"], max_steps=1)
    made.train()
    model = made.model
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / "memsave.json").is_file()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(memsave.errors.SaveError, match="Use memsave.save"):
            other.save_pretrained(tmp_path / "never")
    memsave.convert_model(model)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "memsave.json").is_file() and not (tmp_path / "never").exists()
    memsave.restore_model(model, allow_lossy=True)
    assert "save_pretrained" not in model.__dict__
    model.save_pretrained(tmp_path / "plain")
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")


def test_averaged_codebooks_load_into_a_model_that_has_none_yet(tmp_path: Path) -> None:
    """How many heads they have is known with the first keys alone; also backwards, and by memsave.load."""
    trained, fresh = llama(), llama()
    for model in (trained, fresh):
        memsave.convert_model(model, SPARSE)
    empty = state(fresh)
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    trained(**batch()).loss.backward()
    optimizer.step()
    assert trained.model.layers[0].self_attn.codebook.shape[0] == 2
    fresh.load_state_dict(trained.state_dict())
    assert differing(state(fresh), state(trained)) == []
    trained.load_state_dict(empty)
    assert differing(state(trained), empty) == []
    memsave.save(fresh, tmp_path / "ema")
    assert differing(state(memsave.load(tmp_path / "ema", trained)), state(fresh)) == []
    wrong = {key: value[:, :, :3] if "codebook" in key else value for key, value in state(fresh).items()}
    with pytest.raises(RuntimeError, match="size mismatch for model.layers.0.self_attn.codebook"):
        llama_with(SPARSE).load_state_dict(wrong)


def llama_with(config: Any) -> Any:
    model = llama()
    memsave.convert_model(model, config)
    return model
