"""Trains the demo's model as it is and with sampled weight gradients, for the losses."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import memsave
from benchmarks import demo
from benchmarks.cases.quality import QualityCase


def further_runs(case: QualityCase, done: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The result of each training that is not `done`, one seed after the other. Losses are in nats per byte."""
    there = {(run["seed"], run["linears"], run["variant"]) for run in done}
    for seed in range(case.seeds):
        for linears, variant in case.variants():
            if (seed, linears, variant) not in there:
                run = train(case, linears, variant, seed)
                print(f"seed {seed}, {linears}, {variant}: validation loss {run['validation_loss']:.4f}", flush=True)
                yield run


def train(case: QualityCase, linears: str, variant: str, seed: int) -> dict[str, Any]:
    """One training from start to end, as the demo does it."""
    train_text, text = demo.train_text(), demo.text(case.text)
    run = train_text.Run("plain", demo.options(case, case.steps, seed))
    if variant in case.sampled:
        estimator, keep_ratio = case.sampled[variant]
        config = memsave.WTACRSConfig(keep_ratio=keep_ratio, estimator=estimator, target_modules=case.linears[linears])
        memsave.convert_model(run.model, [memsave.RecomputeNormConfig(), config])
    shape = (case.batch, case.length)
    for index, batch in enumerate(train_text.make_batches(text.train, case.steps, *shape, seed)):
        run.step(index, batch)
    validation = train_text.make_batches(text.validation, train_text.VALIDATION_BATCHES, *shape, seed + 1)
    points = [run.losses[i : i + case.steps_per_point] for i in range(0, case.steps, case.steps_per_point)]
    return {
        "linears": linears,
        "variant": variant,
        "seed": seed,
        "training_losses": [round(statistics.fmean(losses), 5) for losses in points],
        "validation_loss": round(run.validation_loss(validation), 5),
    }
