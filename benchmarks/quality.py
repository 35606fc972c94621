"""Loss of training with sampled gradients on real text: `python -m benchmarks.quality`.

Trains the demo's model (examples/train_text.py) as it is and with sampled weight gradients, from several seeds; a seed
fixes the weights, the batches and the draws. Runs that the result file holds are not repeated, so a benchmark that was
stopped goes on, and one that is complete only draws docs/wta_crs_quality.png and fills in the table of docs/wta_crs.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import memsave

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import train_text  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "wta_crs_quality.json"
PAGE, PLOT = ROOT / "docs" / "wta_crs.md", ROOT / "docs" / "wta_crs_quality.png"
STEPS_PER_POINT = 5

LINEARS = {"down_proj": train_text.SAMPLED_LINEARS, "all linears of the blocks": r".*\.layers\..*_proj"}
SAMPLED = {"pps 0.3": ("pps", 0.3), "wta_crs 0.3": ("wta_crs", 0.3), "pps 0.1": ("pps", 0.1)}
VARIANTS = [("none", "plain"), *((linears, variant) for linears in LINEARS for variant in SAMPLED)]
# In colours that colour-blind readers can tell apart.
COLORS = {"plain": "black", "pps 0.3": "#0072B2", "wta_crs 0.3": "#E69F00", "pps 0.1": "#CC79A7"}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training from start to end. Losses are in nats per byte.

    Attributes:
        linears: which linears are sampled, a key of `LINEARS`, or "none".
        variant: a key of `SAMPLED`, or "plain".
        training_losses: each the mean of `STEPS_PER_POINT` steps.
        validation_loss: after the last step.
    """

    linears: str
    variant: str
    seed: int
    training_losses: list[float]
    validation_loss: float


def train(linears: str, variant: str, seed: int, options: argparse.Namespace) -> Trained:
    """Train one variant as the demo does."""
    options = argparse.Namespace(**{**vars(options), "seed": seed})
    run = train_text.Run("plain", options)
    if variant != "plain":
        estimator, keep_ratio = SAMPLED[variant]
        config = memsave.WTACRSConfig(keep_ratio=keep_ratio, estimator=estimator, target_modules=LINEARS[linears])
        memsave.convert_model(run.model, [memsave.RecomputeNormConfig(), config])
    shape = (options.batch, options.length)
    for index, batch in enumerate(train_text.make_batches(options.data.train, options.steps, *shape, seed)):
        run.step(index, batch)
    validation = train_text.make_batches(options.data.validation, train_text.VALIDATION_BATCHES, *shape, seed + 1)
    points = [run.losses[i : i + STEPS_PER_POINT] for i in range(0, options.steps, STEPS_PER_POINT)]
    return Trained(
        linears=linears,
        variant=variant,
        seed=seed,
        training_losses=[round(statistics.fmean(losses), 5) for losses in points],
        validation_loss=round(run.validation_loss(validation), 5),
    )


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the losses depend on besides the code, the variant and the seed."""
    names = ("size", "steps", "batch", "length", "lr")
    return {
        "settings": {name: getattr(options, name) for name in names} | {"steps_per_point": STEPS_PER_POINT},
        "text": {"source": options.data.source, "training_bytes": len(options.data.train)},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    }


def read_runs(path: Path, settings: dict[str, Any]) -> list[Trained]:
    """The runs that a result file holds; ValueError where they were made under other settings."""
    if not path.exists():
        return []
    data = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if data.get(name) != value:
            raise ValueError(
                f"{path}: its runs have {name} {data.get(name)}, this call has {value}; give another file by --out, or "
                "remove this one. It was not changed"
            )
    return [Trained(**run) for run in data["runs"]]


def write_results(path: Path, settings: dict[str, Any], name: str, results: Sequence[dict[str, Any]]) -> None:
    """Write a result file, `name` as a list with one result a line; the file is whole at every moment."""
    lines = ",\n  ".join(json.dumps(result) for result in results)
    head = json.dumps(settings, indent=1).removesuffix("\n}")
    unfinished = path.with_suffix(".part")
    unfinished.write_text(f'{head},\n "{name}": [\n  {lines}\n ]\n}}\n', encoding="utf-8")
    unfinished.replace(path)


def of_variant(runs: Sequence[Trained], linears: str, variant: str) -> dict[int, Trained]:
    """The runs of one variant by seed."""
    return {run.seed: run for run in runs if (run.linears, run.variant) == (linears, variant)}


def table(data: dict[str, Any]) -> str:
    """The Markdown table of a result file: validation losses, and their differences from plain of the same seed."""
    runs = [Trained(**run) for run in data["runs"]]
    plain = of_variant(runs, "none", "plain")
    lines = [
        "| sampled linears | variant | validation loss, mean (lowest to highest) | more than plain of the same seed |",
        "| --- | --- | --- | --- |",
    ]
    for linears, variant in VARIANTS:
        found = of_variant(runs, linears, variant)
        losses = [run.validation_loss for run in found.values()]
        more = [run.validation_loss - plain[seed].validation_loss for seed, run in found.items()]
        cells = [linears, variant, _spread(losses, "."), "" if variant == "plain" else _spread(more, "+.")]
        lines.append(f"| {' | '.join(cells)} |")
    s, made = data["settings"], data["versions"]
    footnote = (
        f"{len(plain)} seeds, {s['steps']} steps of {s['batch']} x {s['length']} bytes, the demo's {s['size']} model. "
        f"{data['text']['source']}, torch {made['torch']}, transformers {made['transformers']}."
    )
    return "\n".join([*lines, "", footnote])


def _spread(values: Sequence[float], style: str) -> str:
    return f"{statistics.fmean(values):{style}3f} ({min(values):{style}3f} to {max(values):{style}3f})"


def filled(page: str, block: str, text: str) -> str:
    """The text of a page with `text` between `<!-- block -->` and `<!-- end of block -->`."""
    start, end = f"<!-- {block} -->\n", f"<!-- end of {block} -->"
    return re.sub(f"{start}.*?{end}", lambda _: f"{start}{text}\n{end}", page, flags=re.DOTALL)


def draw(data: dict[str, Any], path: Path) -> None:
    """Write the picture: training losses by step, and below what they are more than plain's of the same seed."""
    from matplotlib.figure import Figure

    runs = [Trained(**run) for run in data["runs"]]
    plain = of_variant(runs, "none", "plain")
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplots(2, len(LINEARS), sharex=True, sharey="row")
    for (losses, differences), linears in zip(panels.T, LINEARS, strict=True):
        for variant in COLORS:
            found = plain if variant == "plain" else of_variant(runs, linears, variant)
            validation = statistics.fmean(run.validation_loss for run in found.values())
            label = f"{variant} (validation {validation:.3f})"
            _draw_curves(losses, [run.training_losses for run in found.values()], variant, label)
            pairs = [(run.training_losses, plain[seed].training_losses) for seed, run in found.items()]
            _draw_curves(differences, [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs], variant)
        losses.set_title(f"rows sampled in {linears}")
        losses.legend(frameon=False)
        differences.set_xlabel("step")
    panels[0][0].set_ylabel("training loss (nats per byte)")
    panels[1][0].set_ylabel("more than plain of the same seed")
    figure.suptitle(f"Mean of {len(plain)} seeds and, shaded, their range; plain is the same on both sides")
    figure.savefig(path, dpi=110)


def _draw_curves(axes: Any, curves: Sequence[Sequence[float]], variant: str, label: str | None = None) -> None:
    """The mean of curves, one for each seed, and their range."""
    points = list(zip(*curves, strict=True))  # the seeds' values at each point
    steps = [STEPS_PER_POINT * (point + 0.5) for point in range(len(points))]
    axes.plot(steps, [statistics.fmean(p) for p in points], color=COLORS[variant], label=label, linewidth=1.3)
    axes.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color=COLORS[variant], alpha=0.12)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, one result at a time, then draw and fill in the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seeds", type=train_text.at_least(1), default=5, help="how many seeds, from 0 on (default: 5)"
    )
    parser.add_argument("--size", choices=train_text.SIZES, default="small", help="of the demo's model")
    parser.add_argument("--steps", type=train_text.at_least(3), default=150, help="training steps (default: 150)")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="train on the text files in FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: the committed one)")
    parser.add_argument("--plot", type=Path, default=PLOT, help="picture (default: the one of the docs)")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the table (default: docs/wta_crs.md)")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the same sums in the same order on every machine
    text = [] if chosen.text is None else ["--text", str(chosen.text)]
    demo = ["--size", chosen.size, "--steps", str(chosen.steps), "--out", str(chosen.out.parent)]
    options = train_text.parse_options([*demo, *text])
    settings = settings_of(options)
    runs = read_runs(chosen.out, settings)
    for seed in range(chosen.seeds):
        for linears, variant in VARIANTS:
            if seed not in of_variant(runs, linears, variant):
                runs.append(train(linears, variant, seed, options))
                write_results(chosen.out, settings, "runs", [asdict(run) for run in runs])
                print(f"seed {seed}, {linears}, {variant}: validation loss {runs[-1].validation_loss:.4f}", flush=True)
    data = json.loads(chosen.out.read_text(encoding="utf-8"))
    draw(data, chosen.plot)
    page = chosen.page.read_text(encoding="utf-8")
    chosen.page.write_text(filled(page, "quality", table(data)), encoding="utf-8")
    print(f"Written: {chosen.out}, {chosen.plot}, {chosen.page}")


if __name__ == "__main__":
    main()
