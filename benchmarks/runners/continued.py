"""Trains the demo's model, converts it in several ways, and trains each further on the same batches, in turns."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import memsave
from benchmarks import demo
from benchmarks.cases.sparse_attention import ContinuedCase
from benchmarks.checks import CheckFailed
from memsave.config import applied_configs

STEPS_PER_LINE = 25


def further_runs(case: ContinuedCase, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The result of each further training that is not `done`, one seed after the other. Losses are in nats per byte.

    Raises:
        CheckFailed: a loss is no number, or a variant left the model as it was.
    """
    there = {(run["seed"], run["variant"]) for run in done}
    for seed in range(case.seeds):
        missing = [variant for variant in case.variants if (seed, variant) not in there]
        if missing:
            yield from trained(case, missing, seed)


def trained(case: ContinuedCase, variants: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """For each variant: losses on validation text, and `step_s`, `kept_bytes` and `peak_bytes` of a step.

    `converted_loss` is that before any further step, or None where a method learns in training what it needs;
    `validation_loss` that after all of them.
    """
    train_text, text = demo.train_text(), demo.text(case.text)
    shape = (case.batch, case.length)
    batches = train_text.make_batches(text.train, case.steps + case.further_steps, *shape, seed)
    validation = train_text.make_batches(text.validation, train_text.VALIDATION_BATCHES, *shape, seed + 1)
    run = train_text.Run("plain", demo.options(case, case.steps, seed))
    for index, batch in enumerate(batches[: case.steps]):
        run.step(index, batch)
        say(f"seed {seed}", index, run)
    weights = run.model.state_dict()
    further = dataclasses.replace(case, lr=case.further_lr)
    runs = {name: converted(further, name, weights, list(batches[: case.calibration]), seed) for name in variants}
    before = {name: loss_of(name, run, validation) for name, run in runs.items()}
    for index, batch in enumerate(batches[case.steps :]):
        turn = index % len(runs)
        batch = batch.clone()  # a view would count with the bytes of all batches
        for name in (*variants[turn:], *variants[:turn]):
            runs[name].step(index, batch)
            say(f"seed {seed}, {name}", index, runs[name])
    for name, run in runs.items():
        points = [run.losses[i : i + case.steps_per_point] for i in range(0, case.further_steps, case.steps_per_point)]
        config = case.variants[name]
        yield {
            "variant": name,
            "seed": seed,
            "converted_loss": before[name] if config is None or config.calibrated else None,
            "training_losses": [round(statistics.fmean(losses), 5) for losses in points],
            "validation_loss": loss_of(name, run, validation),
            "step_s": statistics.median(run.step_seconds[1:]),
            "kept_bytes": run.profile.saved_bytes,
            "peak_bytes": run.profile.peak_bytes,
        }


def converted(case: ContinuedCase, name: str, weights: Any, calibration: list[Tensor], seed: int) -> Any:
    """A `train_text.Run` of the trained model, converted."""
    run = demo.train_text().Run("plain", demo.options(case, case.further_steps, seed))
    run.model.load_state_dict(weights)
    config = case.variants[name]
    if config is not None:
        memsave.convert_model(run.model, config, calibration=calibration if config.calibrated else None)
        if not any(config.name in applied_configs(module) for module in run.model.modules()):
            raise CheckFailed(f"{name}: no module of the model was converted")
        settings = {setting: run.optimizer.defaults[setting] for setting in ("lr", "weight_decay")}
        run.optimizer = torch.optim.AdamW(run.model.parameters(), **settings)  # some parameters are new ones
    return run


def loss_of(name: str, run: Any, validation: Tensor) -> float:
    loss: float = run.validation_loss(validation)
    run.model.train()
    if not math.isfinite(loss):
        raise CheckFailed(f"{name}: its validation loss is {loss}")
    return round(loss, 5)


def say(what: str, index: int, run: Any) -> None:
    if (index + 1) % STEPS_PER_LINE == 0:
        print(f"{what}, step {index + 1}: loss {run.losses[-1]:.3f}", flush=True)
