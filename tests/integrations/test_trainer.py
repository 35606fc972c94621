"""MemsaveCallback in transformers' Trainer: what is converted when, what a step is told and what is measured of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

import memsave
from memsave import LaMDAConfig, MemsaveCallback, RoutedFFNConfig, SHiRAConfig, WTACRSConfig
from memsave.config import applied_configs
from memsave.nn.routed_ffn import RoutedFFN, set_balance_scale

from .trainers import BATCH, batch, dataset, llama, logged, trainer

pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*use_reentrant:UserWarning")
ROUTED = RoutedFFNConfig(target_modules=r".*\.mlp")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "compute_metrics": accuracy}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "no_clipping": {"max_grad_norm": 0.0},
    "evaluation": EVALUATED,
    "best": {
        **EVALUATED,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_converted_model_trains_as_the_plain_one_in_less_memory(settings: dict[str, Any], tmp_path: Path) -> None:
    callbacks = [MemsaveCallback(convert, report=False) for convert in (False, None)]
    plain, ours = (trainer(tmp_path / str(i), llama(), c, **settings) for i, c in enumerate(callbacks))
    plain.train(), ours.train()
    tolerance = 2e-3 if "bf16" in settings else 1e-5
    assert logged(ours) == pytest.approx(logged(plain), rel=tolerance) and len(logged(ours)) == 4
    for key in ("eval_loss", "eval_accuracy"):
        assert logged(ours, key) == pytest.approx(logged(plain, key), rel=tolerance)
        assert len(logged(ours, key)) == (2 if "eval_strategy" in settings else 0)
    for mine, theirs in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        # AdamW moves a value whose gradient is nearly 0 by as much as others, and to either side.
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 if "bf16" in settings else 1e-4)
    assert any(applied_configs(module) for module in ours.model.modules())
    if "torch_compile" in settings:
        assert callbacks[1].memory is None
    else:
        (before, after) = (callback.memory for callback in callbacks)
        assert after.profile.saved_bytes < before.profile.saved_bytes
        assert after.profile.peak_bytes < before.profile.peak_bytes


def test_it_prints_what_was_converted_and_what_a_step_took(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback = MemsaveCallback()
    run = trainer(tmp_path, llama(), callback)
    assert str(memsave.convert_model(llama())) in capsys.readouterr().out
    run.train()
    printed = capsys.readouterr().out
    assert str(callback.memory) in printed and "memory of training step 2" in printed
    (entry,) = (entry for entry in run.state.log_history if "memsave_peak_bytes" in entry)
    assert entry["step"] == 2 and entry.items() >= callback.memory.to_log().items()
    silent = MemsaveCallback(report=False)
    trainer(tmp_path, llama(), silent).train()
    assert "memory of training step" not in capsys.readouterr().out and silent.memory is not None


def test_what_is_measured_is_what_memsave_measures_of_the_same_step(tmp_path: Path) -> None:
    callback = MemsaveCallback(report=False)
    trainer(tmp_path, llama(), callback, max_grad_norm=0.0).train()
    found, model = callback.memory, llama()
    memsave.convert_model(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    expected = memsave.measure(step)
    few_bytes = 2048  # the loss, learning rates and the like
    assert found.profile.saved_bytes == pytest.approx(expected.saved_bytes, abs=few_bytes)
    assert found.profile.peak_bytes == pytest.approx(expected.peak_bytes, abs=few_bytes)
    assert max(found.phase_peak_bytes.values()) == found.profile.peak_bytes
    size = sum(p.nbytes for p in model.parameters())
    assert found.phase_peak_bytes["optimizer"] == pytest.approx(
        4 * size, abs=few_bytes
    )  # with gradients and two states
    assert found.phase_peak_bytes["forward"] > 3 * size + 0.9 * found.profile.saved_bytes
    assert found.profile.phase == "backward"


def test_measuring_changes_nothing_and_none_means_no_measurement(tmp_path: Path) -> None:
    runs = []
    for measure_step in (None, 2, 3):
        callback = MemsaveCallback(WTACRSConfig(min_rows=1, target_modules=["up_proj"]), measure_step=measure_step)
        runs.append(trainer(tmp_path, llama(), callback))
        runs[-1].train()
        assert (callback.memory.step if callback.memory else None) == measure_step
    assert logged(runs[0]) == logged(runs[1]) == logged(runs[2])


def test_a_step_that_runs_out_of_memory_leaves_nothing_behind(tmp_path: Path) -> None:
    """`auto_find_batch_size` tries again, and no exit of the measurement was called when the step failed."""
    model = llama()
    failures = iter([False, True])

    def fail(*_: object) -> None:
        if next(failures, False):
            raise RuntimeError("CUDA out of memory.")

    model.model.layers[1].register_forward_hook(fail)
    callback = MemsaveCallback(report=False)
    run = trainer(tmp_path, model, callback, auto_find_batch_size=True)
    run.train()
    assert run._train_batch_size < BATCH and len(logged(run)) >= 4
    assert [entry["step"] for entry in run.state.log_history if "memsave_peak_bytes" in entry] == [2]
    assert _get_current_dispatch_mode() is None


def test_the_next_trainer_ends_what_a_failed_one_left_running(tmp_path: Path) -> None:
    model = llama()
    failures = iter([False, True])
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0 if next(failures) else None)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, model, MemsaveCallback(report=False)).train()
    assert _get_current_dispatch_mode() is not None
    trainer(tmp_path, llama(), MemsaveCallback(report=False))
    assert _get_current_dispatch_mode() is None


@pytest.mark.parametrize("steps", [1, 2])
def test_balance_losses_are_averaged_over_accumulated_batches(steps: int, tmp_path: Path) -> None:
    """Ten samples in batches of two, three batches a step: the second step of an epoch has two batches."""
    alpha, rate = 0.5, 0.5
    config = RoutedFFNConfig(balance_loss=alpha, target_modules=r".*\.mlp")
    settings = {
        "gradient_accumulation_steps": 3,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "learning_rate": rate,
    }
    model = llama()
    run = trainer(tmp_path, model, MemsaveCallback(config), max_steps=steps, max_grad_norm=0.0, **settings)
    loop = llama()
    torch.manual_seed(run.args.seed)  # as the Trainer does before it converts
    memsave.convert_model(loop, config)
    for mine, theirs in zip(model.parameters(), loop.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    order = [batch for batch in run.get_train_dataloader()]
    run.train()
    optimizer = torch.optim.SGD(loop.parameters(), lr=rate)
    for parts in (order[:3], order[3:])[:steps]:
        set_balance_scale(loop, 1 / len(parts))
        for part in parts:
            (loop(**part).loss / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), loop.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert all(m.balance.scale == 1.0 for m in model.modules() if isinstance(m, RoutedFFN))


def test_balance_losses_are_scaled_as_a_gradient_scaler_scales_the_loss() -> None:
    model, callback = llama(), MemsaveCallback(ROUTED, report=False)
    memsave.convert_model(model, ROUTED)
    optimizer = SimpleNamespace(scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    optimizer.scaler.scale(torch.ones(()))
    args = SimpleNamespace(gradient_accumulation_steps=4, torch_compile=False)
    callback.on_step_begin(args, SimpleNamespace(is_world_process_zero=False), None, model=model, optimizer=optimizer)
    assert {m.balance.scale for m in model.modules() if isinstance(m, RoutedFFN)} == {2.0}


def test_loads_of_routed_blocks_are_logged(tmp_path: Path) -> None:
    model = llama()
    run = trainer(tmp_path, model, MemsaveCallback(ROUTED), **EVALUATED)
    run.train()
    entries = [entry for entry in run.state.log_history if "routed_ffn_load_max" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4] and all("loss" in entry for entry in entries)
    for entry in entries:
        assert 0 <= entry["routed_ffn_load_min"] <= 1 <= entry["routed_ffn_load_max"] <= 2
        assert entry["routed_ffn_balance_loss"] == pytest.approx(0.01, rel=0.2)
    assert "routed_ffn_load_max" not in trained_log(llama(), tmp_path)


def trained_log(model: Any, folder: Path) -> str:
    run = trainer(folder, model, MemsaveCallback())
    run.train()
    return str(run.state.log_history)


def lamda() -> Any:
    return LaMDAConfig(r=8, target_modules="all-linear", freeze_until=0.5)


@pytest.mark.parametrize("in_place", [True, False])
def test_lamda_follows_its_schedule(in_place: bool, tmp_path: Path) -> None:
    model = llama() if in_place else peft.get_peft_model(llama(), lamda())
    callback = MemsaveCallback([lamda(), True] if in_place else True, report=False)
    run = trainer(tmp_path, model, callback, max_steps=8, gradient_accumulation_steps=2)
    frozen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            layer = next(m for m in model.modules() if type(m).__name__ == "LaMDALinear")
            frozen.append(layer.frozen_rows("default"))

    run.add_callback(Watch())
    run.train()
    assert frozen == [2, 4, 6, 8, 8, 8, 8, 8]
    assert logged(run)[-1] < logged(run)[0]


@pytest.mark.parametrize("made", ["add_callback", "model_init"])
def test_exact_methods_may_come_late(made: str, tmp_path: Path) -> None:
    callback = MemsaveCallback(report=False)
    if made == "add_callback":
        run = trainer(tmp_path, llama(), bf16=True)
        run.add_callback(callback)
    else:
        run = trainer(tmp_path, None, callback, model_init=lambda: llama(), bf16=True)
    run.train()
    early = trainer(tmp_path, llama(), MemsaveCallback(report=False), bf16=True)
    early.train()
    assert logged(run) == logged(early)
    assert applied_configs(run.model.model.norm) and callback.memory.profile.saved_bytes > 0


@pytest.mark.parametrize("made", ["add_callback", "model_init"])
@pytest.mark.parametrize(
    "config", [ROUTED, lamda(), SHiRAConfig(density=0.1, target_modules=["q_proj"])], ids=["routed", "lamda", "shira"]
)
def test_new_parameters_come_too_late_for_the_optimizer(made: str, config: Any, tmp_path: Path) -> None:
    if made == "add_callback":
        run = trainer(tmp_path, llama())
        run.add_callback(MemsaveCallback(config))
    else:
        run = trainer(tmp_path, None, MemsaveCallback(config), model_init=lambda: llama())
    with pytest.raises(
        memsave.MemsaveError, match="the optimizer exists already.*callbacks=.*The model was not changed"
    ):
        run.train()
    assert not any(applied_configs(module) for module in run.model.modules())


def test_a_wrapped_model_is_not_converted_any_more() -> None:
    """The Trainer shows the model inside of DistributedDataParallel."""
    args, state = SimpleNamespace(world_size=2, n_gpu=0), SimpleNamespace(is_world_process_zero=True, max_steps=4)
    model = llama()
    for convert in (None, WTACRSConfig(target_modules=["up_proj"])):
        with pytest.raises(
            memsave.MemsaveError, match="and the model is wrapped.*callbacks=.*The model was not changed"
        ):
            MemsaveCallback(convert).on_train_begin(args, state, None, model=model)
    memsave.convert_model(model)
    MemsaveCallback().on_train_begin(args, state, None, model=model)


def test_a_model_that_was_converted_in_time_needs_nothing(tmp_path: Path) -> None:
    model = llama()
    memsave.convert_model(model, ROUTED)
    for early in (True, False):
        callback = MemsaveCallback(ROUTED, report=False)
        run = trainer(tmp_path, model, *([callback] if early else []))
        if not early:
            run.add_callback(callback)
        run.train()
        (report,) = callback.conversions
        assert not report.rows and report.already[0].method == "routed_ffn"


def test_an_optimizer_that_was_made_before(tmp_path: Path) -> None:
    for config, fits in (
        (None, True),
        (WTACRSConfig(target_modules=["up_proj"]), True),
        (ROUTED, False),
        (lamda(), False),
    ):
        model = llama()
        optimizers = (torch.optim.AdamW(model.parameters()), None)
        if fits:
            trainer(tmp_path, model, MemsaveCallback(config), optimizers=optimizers).train()
            continue
        with pytest.raises(memsave.MemsaveError, match="was given an optimizer.*The model was not changed"):
            trainer(tmp_path, model, MemsaveCallback(config), optimizers=optimizers)
        assert not any(applied_configs(module) for module in model.modules())


def test_a_peft_model(tmp_path: Path) -> None:
    plain, ours = (peft.get_peft_model(llama(), peft.LoraConfig(**LORA, init_lora_weights="pissa")) for _ in range(2))
    callback = MemsaveCallback(report=False)
    runs = [trainer(tmp_path, plain), trainer(tmp_path, ours, callback)]
    for run in runs:
        run.train()
    assert logged(runs[1]) == pytest.approx(logged(runs[0]), rel=1e-4) and callback.memory is not None
    assert {row.method for row in callback.conversions[0].rows} >= {"recompute_norm", "recompute_mlp"}


def test_a_peft_model_whose_checkpoints_would_lack_the_base(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(**LORA))
    with pytest.raises(memsave.MemsaveError, match="checkpoints hold its adapters alone.*memsave.save"):
        trainer(tmp_path, model, MemsaveCallback(ROUTED), save_strategy="steps")
    assert not any(isinstance(module, RoutedFFN) for module in model.modules())
    trainer(tmp_path, model, MemsaveCallback(ROUTED)).train()


def test_batches_for_methods_that_look_at_data(tmp_path: Path) -> None:
    config = RoutedFFNConfig(clustering="coactivation", target_modules=r".*\.mlp")
    model = llama()
    callback = MemsaveCallback([config, True], calibration=[batch(), batch(2)], report=False)
    run = trainer(tmp_path, model, callback)
    assert len(callback.conversions) == 2 and model.model.layers[0].mlp.unit_order is not None
    run.train()
    with pytest.raises(ValueError, match="needs batches of data"):
        trainer(tmp_path, llama(), MemsaveCallback(config))


def test_what_is_given_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measure_step: expected a whole number from 1 on, got 0"):
        MemsaveCallback(measure_step=0)
    with pytest.raises(ValueError, match="nothing in convert looks at it"):
        MemsaveCallback(ROUTED, calibration=[batch()])
    with pytest.raises(ValueError, match=r"got \[False\]"):
        MemsaveCallback([False])
    with pytest.raises(TypeError, match="expected method configs, got 'wta_crs'"):
        trainer(tmp_path, llama(), MemsaveCallback("wta_crs"))
    assert MemsaveCallback([ROUTED, True, lamda()]).calls == [[ROUTED], None, [lamda()]]


def test_memories_of_gradient_norms_that_no_checkpoint_holds_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for save in (False, True):
        config = WTACRSConfig(grad_norms="sample_cache", save_grad_norms=save, target_modules=["up_proj"])
        trainer(tmp_path, llama(), MemsaveCallback(config))
        assert ("WTACRSConfig(save_grad_norms=True) writes them" in capsys.readouterr().out) is not save


def test_plain_modules_train_too(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(64, 8), nn.LayerNorm(8), nn.Linear(8, 64)

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            logits = self.head(self.norm(self.embed(input_ids)))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    callback = MemsaveCallback(report=False)
    run = trainer(tmp_path, Classifier(), callback, save_strategy="steps", save_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.train()
    assert logged(run)[-1] < logged(run)[0] and callback.memory is not None and len(dataset()) == 10
