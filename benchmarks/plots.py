"""Draws the plots of the docs from the result files, for every folder of results: docs/img/<device>-<plot>.png.

A picture carries a digest of what it shows, so that a test can tell whether it is current without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import result_files
from benchmarks.formats import MIB, by_size, in_words
from benchmarks.result_files import RESULTS
from benchmarks.tables import ROOT, by_variant, by_way, device_in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = ROOT / "docs" / "img"
DIGEST = "Digest"  # the key in the picture's metadata
MEMORY, TIME, OP = "#4c72b0", "#dd8452", "#55a868"
INCHES_PER_BAR = 0.26
INFERENCE = ("flash_svd_bert_layer", "patch_conv_mobilenet_v2_1024")  # beside the training step of all methods
MANY = 20  # cases in one plot, which is drawn with fewer dots then
# Colour-blind readers can tell them apart.
LINES = ("black", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")  # one for each of LINES


@dataclass(frozen=True)
class Plot:
    """A picture to be: what it shows, how it is drawn, where it goes."""

    path: Path
    shown: Sequence[dict[str, Any]]
    draw: Callable[[Sequence[dict[str, Any]]], Figure]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.shown, sort_keys=True).encode()).hexdigest()

    def is_current(self) -> bool:
        from PIL import Image  # comes with matplotlib

        if not self.path.exists():
            return False
        with Image.open(self.path) as image:
            return image.info.get(DIGEST) == self.digest()

    def write(self) -> None:
        """Draws it, unless the picture is there and current: another matplotlib would draw other bytes."""
        from PIL import Image, PngImagePlugin

        if not self.is_current():
            drawn, notes = BytesIO(), PngImagePlugin.PngInfo()
            self.draw(self.shown).savefig(drawn, dpi=80 if len(self.shown) > MANY else 100)
            notes.add_text(DIGEST, self.digest())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # 64 colours are enough for curves and bars, and the file is several times smaller.
            Image.open(drawn).convert("RGB").quantize(64).save(self.path, pnginfo=notes, optimize=True)


def all_plots(results: Path = RESULTS, images: Path = IMAGES) -> list[Plot]:
    """Every plot that the result files allow. Raises ResultError for a file of no use."""
    plots = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = _results_of(folder)
        steps = [data for data in found if data["case"]["kind"] == "step"]
        ops = [data for data in found if data["case"]["kind"] == "op" and not data["case"]["name"].startswith("tiles")]
        if steps:
            plots.append(Plot(images / f"{folder.name}-steps.png", steps, draw_steps))
            plots.append(Plot(images / f"{folder.name}-pareto.png", steps, draw_pareto))
        if methods := [data for data in found if data["case"]["kind"] == "methods"]:
            inference = [data for data in found if data["case"]["name"] in INFERENCE]
            plots.append(Plot(images / f"{folder.name}-methods.png", [*methods, *inference], draw_pareto))
        if ops:
            plots.append(Plot(images / f"{folder.name}-ops.png", ops, draw_ops))
        convolutions = [data for data in found if data["case"]["kind"] == "convolution"]
        if convolutions:
            plots.append(Plot(images / f"{folder.name}-patch_conv.png", convolutions, draw_convolutions))
        attentions = [data for data in found if data["case"]["kind"] == "sparse_attention"]
        if attentions:
            plots.append(Plot(images / f"{folder.name}-sparse_mha.png", attentions, draw_attention))
        trained = [data for data in found if data["case"]["kind"] == "quality"]
        plots += [Plot(images / f"{folder.name}-{data['case']['name']}.png", [data], draw_quality) for data in trained]
        smaller = [data for data in found if data["case"]["kind"] == "compression"]
        plots += [
            Plot(images / f"{folder.name}-{data['case']['name']}.png", [data], draw_compression) for data in smaller
        ]
    return plots


def _results_of(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in folder.glob("*.json") if path.stem not in result_files.OF_EXAMPLES)
    return [result_files.read(path) for path in paths]


def draw_steps(shown: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each training step: peak memory and time of every variant, relative to the plain model."""
    from matplotlib.figure import Figure

    rows = [len(data["results"]) for data in shown]
    figure = Figure(figsize=(8, 0.9 * len(shown) + 2 * INCHES_PER_BAR * sum(rows)), layout="constrained")
    panels = figure.subplots(len(shown), 1, height_ratios=rows, squeeze=False)[:, 0]
    for axes, data in zip(panels, shown, strict=True):
        first = data["results"][0]
        bars = {
            "peak memory": (MEMORY, [_peak_bytes(r) / _peak_bytes(first) for r in data["results"]]),
            "step time": (TIME, [r["median_s"] / first["median_s"] for r in data["results"]]),
        }
        _draw_bars(axes, [r["variant"] for r in data["results"]], bars)
        axes.axvline(1, color="gray", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(f"{data['case']['title']}\n{device_in_words(data)}", fontsize=9)
    panels[-1].set_xlabel("relative to the plain model; less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure


def draw_convolutions(shown: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each network: peak memory and time of every other way to run it, relative to the first."""
    from matplotlib.figure import Figure

    pairs = [shown[i : i + 2] for i in range(0, len(shown), 2)]
    rows = [max(len(data["results"]) for data in pair) for pair in pairs]
    figure = Figure(figsize=(12, 0.7 * len(pairs) + 1.5 * INCHES_PER_BAR * sum(rows)), layout="constrained")
    grid = figure.subplots(len(pairs), 2, height_ratios=rows, squeeze=False)
    for axes, data in zip(grid.flat, shown, strict=False):
        first, *others = data["results"]
        bars = {
            "peak memory": (MEMORY, [r["peak_bytes"] / first["peak_bytes"] for r in others]),
            "time": (TIME, [r["median_s"] / first["median_s"] for r in others]),
        }
        _draw_bars(axes, [r["way"] for r in others], bars)
        axes.axvline(1, color="gray", linewidth=0.8, linestyle=":", zorder=0)
        title, _, image = data["case"]["title"].partition(" without gradients, ")
        axes.set_title(f"{title}\n{image}", fontsize=9)
    for axes in grid.flat[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle(f"relative to the whole model; less is better\n{device_in_words(shown[0])}", fontsize=9)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure


def draw_attention(shown: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each kind of attention: times of forward and backward by length, or of forward where it is all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, data in zip(panels, shown, strict=True):
        ways: dict[str, list[dict[str, Any]]] = {}
        for row in data["results"]:
            ways.setdefault(row["way"], []).append(row)
        for (way, rows), color, marker in zip(ways.items(), LINES, MARKERS, strict=False):
            parts = [part for part in ("forward", "backward") if rows[0][part]]
            points = [row["size"]["T"] for row in rows], [sum(row[p]["median_s"] for p in parts) for row in rows]
            label = way if len(parts) > 1 else f"{way}, forward alone"
            line = "-" if len(parts) > 1 else ":"
            axes.plot(*points, line, color=color, marker=marker, markersize=4, linewidth=1.3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_title(data["case"]["title"].partition(";")[0].replace(", ", "\n", 1), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds, forward and backward")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(device_in_words(shown[0]), fontsize=9)
    return figure


def draw_pareto(shown: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each training step, each variant a point with a number: peak memory and time. A line joins those of
    which no other is both smaller and faster."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2 * len(shown)), layout="constrained")
    for axes, data in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        size = data["results"][-1].get("size")
        rows = [r for r in data["results"] if r.get("size") == size]
        points = sorted((_peak_bytes(r) / MIB, r["median_s"] * 1e3, r.get("variant") or r["way"]) for r in rows)
        for number, (mebibytes, milliseconds, variant) in enumerate(points, 1):
            color = TIME if variant.startswith("memsave") else MEMORY
            axes.plot(mebibytes, milliseconds, "o", color=color, label=f"{number}  {variant}")
            axes.annotate(f" {number}", (mebibytes, milliseconds), fontsize=8, va="bottom")
        best = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
        axes.plot([p[0] for p in best], [p[1] for p in best], color="gray", linewidth=0.8, linestyle=":", zorder=0)
        axes.margins(x=0.1, y=0.1)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("peak memory (MiB); less is better")
        axes.set_ylabel("time (ms); less is better")
        measured = f"; {in_words(size)}" if size else ""
        axes.set_title(f"{data['case']['title']}{measured}\n{device_in_words(data)}", fontsize=9)
    return figure


def _peak_bytes(result: dict[str, Any]) -> int:
    """On a GPU the allocator's peak, which compiled code has, too; of a layer, what it takes beyond its input."""
    return result.get("allocator_peak_bytes") or result.get("peak_bytes") or result["temporary_bytes"]


def draw_ops(shown: Sequence[dict[str, Any]]) -> Figure:
    """How many times faster memsave's backend is than plain PyTorch, for each op and size."""
    from matplotlib.figure import Figure

    names, speedups = [], []
    for data in shown:
        for figures in by_size(data):
            times = {r["contender"]: r["median_s"] for r in figures}
            if "memsave" not in times:
                continue  # an op without kernels
            names.append(f"{data['case']['name'].removeprefix('op_')}  {in_words(figures[0]['size'])}")
            speedups.append(times["plain PyTorch"] / times["memsave"])
    figure = Figure(figsize=(10, 1.2 + INCHES_PER_BAR * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    _draw_bars(axes, names, {"": (OP, speedups)}, start=1.0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(min(0.5, 0.6 * min(speedups)), 2 * max(speedups))
    axes.margins(y=0.01)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("time of plain PyTorch / time of memsave; more is better")
    axes.set_title(f"memsave's ops beside plain PyTorch\n{device_in_words(shown[0])}", fontsize=9)
    return figure


def draw_quality(shown: Sequence[dict[str, Any]]) -> Figure:
    """Training losses by step, and below what they are more than plain's of the same seed."""
    from matplotlib.figure import Figure

    (data,) = shown
    found = by_variant(data)
    plain = found["none", "plain"]
    groups = list(dict.fromkeys(linears for linears, _ in found if linears != "none")) or ["none"]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    panels = figure.subplots(2, len(groups), sharex=True, sharey="row", squeeze=False)
    for (losses, differences), group in zip(panels.T, groups, strict=True):
        names = [variant for linears, variant in found if linears in ("none", group)]
        for variant, color in zip(names, LINES, strict=False):
            runs = plain if variant == "plain" else found[group, variant]
            curves = {seed: run["training_losses"] for seed, run in runs.items()}
            validation = statistics.fmean(run["validation_loss"] for run in runs.values())
            points = data["case"]["steps_per_point"], color
            _draw_curves(losses, list(curves.values()), *points, f"{variant} (validation {validation:.3f})")
            pairs = [(curve, plain[seed]["training_losses"]) for seed, curve in curves.items()]
            _draw_curves(differences, [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs], *points)
        losses.set_title(f"rows sampled in {group}", fontsize=9)
        losses.legend(frameon=False, fontsize=8)
        differences.set_xlabel("step")
    panels[0][0].set_ylabel("training loss (nats per byte)")
    panels[1][0].set_ylabel("more than plain of the same seed")
    title = f"Mean of {len(plain)} seeds and, shaded, their range; plain is the same on both sides"
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_curves(
    axes: Axes, curves: Sequence[Sequence[float]], steps_per_point: int, color: str, label: str | None = None
) -> None:
    """The mean of curves, one for each seed, and their range."""
    points = list(zip(*curves, strict=True))  # the seeds' values at each point
    steps = [steps_per_point * (point + 0.5) for point in range(len(points))]
    axes.plot(steps, [statistics.fmean(p) for p in points], color=color, label=label, linewidth=1.3)
    axes.fill_between(steps, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.12)


def draw_compression(shown: Sequence[dict[str, Any]]) -> Figure:
    """How close the embeddings of compressed encoders are to the original's, by ratio: a line for each way."""
    from matplotlib.figure import Figure

    (data,) = shown
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    words = {"mean_cosine": "mean cosine with the original's", "rank_correlation": "rank correlation of similarities"}
    panels = figure.subplots(1, len(words), sharey=True)
    for axes, (name, label) in zip(panels, words.items(), strict=True):
        for (way, results), color, marker in zip(by_way(data).items(), LINES, MARKERS, strict=False):
            points = [row["ratio"] for row in results], [row[name] for row in results]
            axes.plot(*points, color=color, marker=marker, markersize=4, linewidth=1.3, label=way)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle=":", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("ratio: share of the linears' parameters kept")
        axes.set_title(label, fontsize=9)
    panels[-1].legend(loc="lower right", frameon=False, fontsize=8)
    case = data["case"]
    figure.suptitle(f"Embeddings of {case['evaluated']} {case['source']} by {case['model']}", fontsize=9)
    return figure


def _draw_bars(axes: Axes, names: Sequence[str], bars: dict[str, tuple[str, list[float]]], start: float = 0.0) -> None:
    """Horizontal bars from `start` on, the first name on top, with their values."""
    height = 0.8 / len(bars)
    for place, (label, (color, values)) in enumerate(bars.items()):
        positions = [row + (place - (len(bars) - 1) / 2) * height for row in range(len(names))]
        drawn = axes.barh(positions, [value - start for value in values], height, left=start, label=label, color=color)
        on_white = {"facecolor": "white", "linewidth": 0, "pad": 0.5}
        axes.bar_label(drawn, [f"{value:.2f}x" for value in values], padding=3, fontsize=7, bbox=on_white)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
