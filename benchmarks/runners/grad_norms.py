"""Measures what remembered gradient norms do to the variance.

Trains the demo's model on the same few batches for some epochs, with sampled linears and `grad_norms="sample_cache"`.
Before a visit, the variance that drawing rows would have is computed from x and dy of every linear, for several
weights of the rows.

Shapes: E batches of an epoch, B sequences of T bytes; N rows, x (N, D), dy (N, O); k of N rows are drawn.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

import memsave
from benchmarks import demo
from benchmarks.cases.quality import GradNormsCase
from memsave import ops
from memsave.nn.linear import ConvertedLinear

SEED, SEED_BEFORE = 0, 9  # of the weights and the batches; of the other batches before
SCHEDULE_STEPS = 100  # of the demo's learning rate, for the steps before


def run_grad_norms_case(case: GradNormsCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The variances of every training. `rounds` has no use here: nothing is timed."""
    return [row for name in case.trainings for row in measure(case, name)], {}


def measure(case: GradNormsCase, name: str) -> list[dict[str, Any]]:
    """The variances of one training by epoch and kind of linear, each the mean over layers and two batches."""
    model = Epochs(case, name)
    results = []
    for epoch in range(1, case.epochs + 1):
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for index in range(case.batches):
            if epoch > 1 and index in (0, case.batches // 2):
                for kind, figures in model.variances(index).items():
                    found[kind] += figures
            model.step(index)
        for kind, figures in found.items():
            means = {way: round(statistics.fmean(f[way] for f in figures), 4) for way in figures[0]}
            results.append({"training": name, "epoch": epoch, "linear": kind} | means)
    return results


class Epochs:
    """One model that is trained on the same batches (E, B, T) again and again."""

    def __init__(self, case: GradNormsCase, name: str) -> None:
        train_text, data = demo.train_text(), demo.text(case.text).train
        steps_before, lr = case.trainings[name]
        shape = (case.batch, case.length)
        self.keep_ratio = case.keep_ratio
        self.batches = train_text.make_batches(data, case.batches, *shape, SEED)
        self.run = train_text.Run("plain", demo.options(case, SCHEDULE_STEPS, SEED))
        for index, batch in enumerate(train_text.make_batches(data, steps_before, *shape, SEED_BEFORE)):
            self.run.step(index, batch)
        config = memsave.WTACRSConfig(keep_ratio=case.keep_ratio, grad_norms="sample_cache", target_modules=case.target)
        memsave.convert_model(self.run.model, [memsave.RecomputeNormConfig(), config])
        self.linears = {n: m for n, m in self.run.model.named_modules() if isinstance(m, ConvertedLinear)}
        self.linears = {n: m for n, m in self.linears.items() if m.weight.requires_grad and "_proj" in n}
        for group in self.run.optimizer.param_groups:
            group["lr"] = lr

    def ids(self, index: int) -> list[int]:
        count = self.batches.shape[1]
        return list(range(index * count, (index + 1) * count))

    def step(self, index: int) -> None:
        with memsave.sample_ids(self.ids(index)):
            loss = self.run.model(input_ids=self.batches[index], labels=self.batches[index]).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.run.model.parameters(), 1.0)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad()

    def rows(self, index: int) -> dict[str, tuple[Tensor, Tensor]]:
        """x and dy of every linear for a batch, by name; exact, in evaluation mode."""
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            y.register_hook(lambda dy: found.update({name: (x.detach().flatten(0, 1), dy.flatten(0, 1))}))

        hooks = [
            linear.register_forward_hook(lambda _, args, y, name=name: keep(name, args[0], y))
            for name, linear in self.linears.items()
        ]
        self.run.model.eval()
        self.run.model(input_ids=self.batches[index], labels=self.batches[index]).loss.backward()
        self.run.model.train()
        self.run.optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        return found

    def variances(self, index: int) -> dict[str, list[dict[str, float]]]:
        """By kind of linear, for each of them: the variance without a memory, and with others over that."""
        ids = self.ids(index)
        with memsave.sample_ids(ids):  # writes what the last step collected
            pass
        rows, sharing = self.rows(index), list[list[str]]()  # names of linears, the memory's owner first
        for name, linear in self.linears.items():
            if linear._grad_norm_cache.codes.numel():
                sharing.append([])
            sharing[-1].append(name)
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for names in sharing:
            cache = self.linears[names[0]]._grad_norm_cache
            factors = cache.factors(torch.tensor(ids), self.batches.shape[2], torch.device("cpu")).flatten()
            now = torch.stack([rows[name][1].norm(dim=1) for name in names]).norm(dim=0)
            for name in names:
                figures = compared(*rows[name], factors, now, self.keep_ratio)
                found[name.rpartition(".")[2]].append(figures)
        return found


def compared(x: Tensor, dy: Tensor, factors: Tensor, now: Tensor, keep_ratio: float) -> dict[str, float]:
    """The variance by |x| alone, and over that: with the memory's factors (N,), its norms alone, and those of `now`."""
    k, norms = int(keep_ratio * len(x)), x.norm(dim=1)
    none = expected_variance(x, dy, norms, k)
    ways = {"remembered": factors, "norms alone": (2 * factors - 1).clamp(min=1 / 16), "best": now}
    return {"none": none} | {way: expected_variance(x, dy, norms * factor, k) / none for way, factor in ways.items()}


def expected_variance(x: Tensor, dy: Tensor, weights: Tensor, k: int) -> float:
    """E|dW - G|^2 / |G|^2 of `pps` with these weights (N,), by Hajek's approximation (see docs/wta_crs.md)."""
    pi = ops.row_inclusion(weights, k).double() / 2**32
    m = (pi < 1).sum()
    b = pi * (1 - pi) * m / (m - 1)
    products = (x.double() @ x.double().t()) * (dy.double() @ dy.double().t())  # (N, N) of Y_i and Y_j
    variance = (b / pi**2 * products.diagonal()).sum() - (b / pi) @ products @ (b / pi) / b.sum()
    return float(variance / products.sum())
