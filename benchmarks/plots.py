"""Draws the plots of the docs from the result files, for every folder of results: docs/img/<device>-<plot>.png.

A picture carries a digest of what it shows, so that a test can tell whether it is current without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import result_files
from benchmarks.result_files import RESULTS
from benchmarks.tables import ROOT, by_size, device_in_words, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = ROOT / "docs" / "img"
DIGEST = "Digest"  # the key in the picture's metadata
MEMORY, TIME, OP = "#4c72b0", "#dd8452", "#55a868"
INCHES_PER_BAR = 0.26


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
        if not self.is_current():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.draw(self.shown).savefig(self.path, dpi=100, metadata={DIGEST: self.digest()})


def all_plots(results: Path = RESULTS, images: Path = IMAGES) -> list[Plot]:
    """Every plot that the result files allow. Raises ResultError for a file of no use."""
    plots = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        found = _results_of(folder)
        steps = [data for data in found if data["case"]["kind"] == "step"]
        ops = [data for data in found if data["case"]["kind"] == "op" and not data["case"]["name"].startswith("tiles")]
        if steps:
            plots.append(Plot(images / f"{folder.name}-steps.png", steps, draw_steps))
        if ops:
            plots.append(Plot(images / f"{folder.name}-ops.png", ops, draw_ops))
    return plots


def _results_of(folder: Path) -> list[dict[str, Any]]:
    # demo.json is the output of examples/train_text.py, which draws its own picture.
    return [result_files.read(path) for path in sorted(folder.glob("*.json")) if path.stem != "demo"]


def draw_steps(shown: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each training step: peak memory and time of every variant, relative to the plain model."""
    from matplotlib.figure import Figure

    rows = [len(data["results"]) for data in shown]
    figure = Figure(figsize=(8, 0.9 * len(shown) + 2 * INCHES_PER_BAR * sum(rows)), layout="constrained")
    panels = figure.subplots(len(shown), 1, height_ratios=rows, squeeze=False)[:, 0]
    for axes, data in zip(panels, shown, strict=True):
        first = data["results"][0]
        bars = {
            "peak memory": (MEMORY, [r["peak_bytes"] / first["peak_bytes"] for r in data["results"]]),
            "step time": (TIME, [r["median_s"] / first["median_s"] for r in data["results"]]),
        }
        _draw_bars(axes, [r["variant"] for r in data["results"]], bars)
        axes.axvline(1, color="gray", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(f"{data['case']['title']}\n{device_in_words(data)}", fontsize=9)
    panels[-1].set_xlabel("relative to the plain model; less is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return figure


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
    figure = Figure(figsize=(8, 1.2 + 1.2 * INCHES_PER_BAR * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    _draw_bars(axes, names, {"": (OP, speedups)}, start=1.0)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlim(min(0.5, 0.6 * min(speedups)), 2 * max(speedups))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("time of plain PyTorch / time of memsave; more is better")
    axes.set_title(f"memsave's ops beside plain PyTorch\n{device_in_words(shown[0])}", fontsize=9)
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
