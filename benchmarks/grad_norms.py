"""What remembered gradient norms do to the variance: `python -m benchmarks.grad_norms`.

Trains the demo's model (examples/train_text.py) on the same few batches for some epochs, with every linear of the
blocks sampled and `grad_norms="sample_cache"`: from random weights, and from trained ones with a small learning rate,
as in fine-tuning. Before a visit, the variance that drawing rows would have is computed from x and dy of every linear,
for several weights of the rows. Writes a result file and the table of docs/wta_crs.md.

Shapes: N rows, x (N, D), dy (N, O); k of N rows are drawn.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memsave
from benchmarks.quality import LINEARS, PAGE, ROOT, filled, settings_of, train_text, write_results
from memsave import ops
from memsave.nn.linear import ConvertedLinear

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "wta_crs_grad_norms.json"
KEEP_RATIO = 0.3
PRETRAINING_SEED = 9
# By name: steps on other batches first, and the learning rate of the epochs.
TRAININGS = {"from random weights": (0, 1e-3), "from trained weights": (80, 1e-4)}
WEIGHTS = {
    "remembered": "half remembered norms (memsave)",
    "norms alone": "remembered norms alone (paper)",
    "best": "the norms themselves (best)",
}


def expected_variance(x: Tensor, dy: Tensor, weights: Tensor, k: int) -> float:
    """E|dW - G|^2 / |G|^2 of `pps` with these weights (N,), by Hajek's approximation (see docs/wta_crs.md)."""
    pi = ops.row_inclusion(weights, k).double() / 2**32
    m = (pi < 1).sum()
    b = pi * (1 - pi) * m / (m - 1)
    products = (x.double() @ x.double().t()) * (dy.double() @ dy.double().t())  # (N, N) of Y_i and Y_j
    variance = (b / pi**2 * products.diagonal()).sum() - (b / pi) @ products @ (b / pi) / b.sum()
    return float(variance / products.sum())


class Epochs:
    """One model that is trained on the same batches (E, B, T) again and again."""

    def __init__(self, name: str, options: argparse.Namespace, batches: Tensor) -> None:
        pretraining_steps, self.lr = TRAININGS[name]
        self.run = train_text.Run("plain", options)
        self.batches = batches
        data = options.data.train
        shape = (pretraining_steps, options.batch, options.length)
        for index, batch in enumerate(train_text.make_batches(data, *shape, PRETRAINING_SEED)):
            self.run.step(index, batch)
        targets = LINEARS["all linears of the blocks"]
        config = memsave.WTACRSConfig(keep_ratio=KEEP_RATIO, grad_norms="sample_cache", target_modules=targets)
        memsave.convert_model(self.run.model, [memsave.RecomputeNormConfig(), config])
        self.linears = {n: m for n, m in self.run.model.named_modules() if isinstance(m, ConvertedLinear)}
        self.linears = {n: m for n, m in self.linears.items() if m.weight.requires_grad and "_proj" in n}
        for group in self.run.optimizer.param_groups:
            group["lr"] = self.lr

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
                figures = compared(*rows[name], factors, now)
                found[name.rpartition(".")[2]].append(figures)
        return found


def compared(x: Tensor, dy: Tensor, factors: Tensor, now: Tensor) -> dict[str, float]:
    """The variance by |x| alone, and over that: with the memory's factors (N,), its norms alone, and those of `now`."""
    k, norms = int(KEEP_RATIO * len(x)), x.norm(dim=1)
    none = expected_variance(x, dy, norms, k)
    ways = {"remembered": factors, "norms alone": (2 * factors - 1).clamp(min=1 / 16), "best": now}
    return {"none": none} | {way: expected_variance(x, dy, norms * factor, k) / none for way, factor in ways.items()}


def measure(name: str, options: argparse.Namespace, count: int, epochs: int) -> list[dict[str, Any]]:
    """The variances of one training by epoch and kind of linear, each the mean over layers and two batches."""
    batches = train_text.make_batches(options.data.train, count, options.batch, options.length, options.seed)
    model = Epochs(name, options, batches)
    results = []
    for epoch in range(1, epochs + 1):
        found: dict[str, list[dict[str, float]]] = defaultdict(list)
        for index in range(count):
            if epoch > 1 and index in (0, count // 2):
                for kind, figures in model.variances(index).items():
                    found[kind] += figures
            model.step(index)
        for kind, figures in found.items():
            means = {way: round(statistics.fmean(f[way] for f in figures), 4) for way in figures[0]}
            results.append({"training": name, "epoch": epoch, "linear": kind} | means)
            print(results[-1], flush=True)
    return results


def table(data: dict[str, Any]) -> str:
    """The Markdown table of a result file: each the mean over the kinds of linears, and their range."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for result in data["results"]:
        rows[result["training"], result["epoch"]].append(result)
    lines = [
        f"| training | epoch | without a memory | {' | '.join(WEIGHTS.values())} |",
        f"| {' | '.join(['---'] * (3 + len(WEIGHTS)))} |",
    ]
    for (training, epoch), found in rows.items():
        cells = [_spread([f["none"] for f in found]), *(_spread([f[way] for f in found], "x") for way in WEIGHTS)]
        lines.append(f"| {training} | {epoch} | {' | '.join(cells)} |")
    s, made = data["settings"], data["versions"]
    footnote = (
        "Variance of dW over |dW|² by |x| alone, and times that with other weights: mean over the kinds of linears "
        "(lowest to highest). "
        f"The demo's {s['size']} model, pps {KEEP_RATIO} on all linears of the blocks, "
        f"{s['batches']} batches of {s['batch']} x {s['length']} bytes. {data['text']['source']}, "
        f"torch {made['torch']}."
    )
    return "\n".join([*lines, "", footnote])


def _spread(values: Sequence[float], unit: str = "") -> str:
    return f"{statistics.fmean(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything anew, write the result file and fill in the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=train_text.SIZES, default="small", help="of the demo's model")
    parser.add_argument("--batches", type=train_text.at_least(2), default=12, help="batches of an epoch (default: 12)")
    parser.add_argument("--epochs", type=train_text.at_least(2), default=4, help="how many (default: 4)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="train on the text files in FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: the committed one)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the table (default: docs/wta_crs.md)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    text = [] if chosen.text is None else ["--text", str(chosen.text)]
    options = train_text.parse_options(
        ["--size", chosen.size, "--steps", "100", "--out", str(chosen.out.parent), *text]
    )
    results = [r for name in TRAININGS for r in measure(name, options, chosen.batches, chosen.epochs)]
    shape = {"size": chosen.size, "batches": chosen.batches, "batch": options.batch, "length": options.length}
    settings = settings_of(options) | {"settings": shape | {"epochs": chosen.epochs, "keep_ratio": KEEP_RATIO}}
    write_results(chosen.out, settings, "results", results)
    page = chosen.page.read_text(encoding="utf-8")
    chosen.page.write_text(filled(page, "grad_norms", table(settings | {"results": results})), encoding="utf-8")


if __name__ == "__main__":
    main()
