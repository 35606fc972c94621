"""Figures of one training job run in several variants: as a table, in words and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import memsave

# From the bottom of a stack to its top, in colours that colour-blind readers can tell apart.
COLORS = {
    "weights": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#999999",
    "kept for backward": "#E69F00",
    "temporary": "#F0E442",
    "input": "#009E73",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one variant. Loss is in nats per byte."""

    variant: str
    peak_bytes: int
    kept_bytes: int
    step_seconds: float
    validation_loss: float
    training_losses: list[float]
    profile: memsave.MemoryProfile


def table(results: Sequence[Result]) -> str:
    """One line per variant; ratios are to the first one."""
    first = results[0]
    header = ("variant", "peak", "", "kept for backward", "", "median step", "", "validation loss", "")
    rows = [header]
    for r in results:
        rows.append(
            (
                r.variant,
                f"{r.peak_bytes / 2**20:.1f} MiB",
                f"{r.peak_bytes / first.peak_bytes:.2f}x",
                f"{r.kept_bytes / 2**20:.1f} MiB",
                f"{r.kept_bytes / first.kept_bytes:.2f}x",
                f"{r.step_seconds * 1e3:.0f} ms",
                f"{r.step_seconds / first.step_seconds:.2f}x",
                f"{r.validation_loss:.4f}",
                f"{r.validation_loss - first.validation_loss:+.4f}",
            )
        )
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of one length as lines, the first of them a header: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def in_words(results: Sequence[Result], keep_ratio: float) -> list[str]:
    """What the figures say, every number in it computed from them."""
    first, *others = results
    by_name = {r.variant: r for r in results}
    sentences = [
        f"{r.variant} peaks at {r.peak_bytes / first.peak_bytes:.0%} of {first.variant}'s bytes and keeps "
        f"{r.kept_bytes / first.kept_bytes:.0%} of its bytes for backward, at "
        f"{r.step_seconds / first.step_seconds:.2f}x its step time; its validation loss differs by "
        f"{r.validation_loss - first.validation_loss:+.4f}."
        for r in others
    ]
    for name in ("exact", "all"):
        if "plain" in by_name and name in by_name:
            sentences.append(_rounding_in_words(by_name["plain"], by_name[name]))
    for base, added, what in (
        ("exact", "all", "computing the MLPs again"),
        ("all", "all+wta_crs", f"sampling {keep_ratio:.0%} of the rows"),
    ):
        if base in by_name and added in by_name:
            sentences.append(f"What {what} adds to {base}: {_change_in_words(by_name[base], by_name[added])}.")
    fixed_bytes = sum(first.profile.by_category[name] for name in ("weights", "gradients", "optimizer"))
    sentences.append(
        f"{fixed_bytes / 2**20:.1f} MiB of {first.variant}'s peak are weights, gradients and optimizer states, which "
        "no variant here makes smaller. Each loss comes from one seed: of a small difference, part is chance."
    )
    return sentences


def _rounding_in_words(plain: Result, exact: Result) -> str:
    pairs = zip(plain.training_losses, exact.training_losses, strict=True)
    gaps = [abs(one - other) for one, other in pairs]
    return (
        f"{exact.variant} computes what {plain.variant} does up to rounding: their training losses differ by "
        f"{max(gaps[:10]):.1g} at most in the first ten steps; training makes rounding grow, to {max(gaps):.1g} at "
        "most."
    )


def _change_in_words(before: Result, after: Result) -> str:
    return (
        f"the peak changes by {after.peak_bytes / before.peak_bytes - 1:+.0%}, the bytes kept for backward by "
        f"{after.kept_bytes / before.kept_bytes - 1:+.0%}, the step time by "
        f"{after.step_seconds / before.step_seconds - 1:+.0%}, the validation loss by "
        f"{after.validation_loss - before.validation_loss:+.4f}"
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Writes a picture: the memory of one step of each variant over time, and all loss curves below."""
    figure = Figure(figsize=(max(8, 3.4 * len(results)), 8), layout="constrained")
    grid = figure.add_gridspec(2, len(results))
    shared = None
    for column, result in enumerate(results):
        shared = figure.add_subplot(grid[0, column], sharey=shared)
        _draw_memory(shared, result)
        if column == 0:
            shared.set_ylabel("live memory, one training step (MiB)")
    handles, labels = shared.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
    _draw_losses(figure.add_subplot(grid[1, :]), results)
    figure.savefig(path, dpi=110)


def _draw_memory(axes: Axes, result: Result) -> None:
    timeline = result.profile.timeline
    progress = [100 * event / max(timeline.event[-1], 1) for event in timeline.event]
    mebibytes = [[size / 2**20 for size in timeline.live_bytes[name]] for name in COLORS]
    axes.stackplot(progress, mebibytes, labels=list(COLORS), colors=list(COLORS.values()), step="post", linewidth=0)
    axes.axhline(result.peak_bytes / 2**20, color="black", linewidth=1, linestyle=":", label="peak")
    axes.set_title(f"{result.variant}\npeak {result.peak_bytes / 2**20:.0f} MiB in {result.profile.phase}")
    axes.set_xlabel("% of the step's memory events")
    axes.set_xlim(0, 100)


def _draw_losses(axes: Axes, results: Sequence[Result]) -> None:
    """Training losses as moving averages. Later curves are thinner, so that equal ones stay visible below them."""
    for place, result in enumerate(results):
        losses = result.training_losses
        window = max(1, len(losses) // 20)
        smooth = [fmean(losses[max(0, i + 1 - window) : i + 1]) for i in range(len(losses))]
        label = f"{result.variant} (validation {result.validation_loss:.3f})"
        axes.plot(smooth, label=label, linewidth=1.5 + 2 * (len(results) - 1 - place))
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    axes.set_title("The same batches for every variant")
    axes.legend(frameon=False)
