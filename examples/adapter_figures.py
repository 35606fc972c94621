"""Figures of one model fine-tuned in several ways: as a table, in words and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from comparison import COLORS, aligned
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import memsave

# Colours that colour-blind readers can tell apart.
LINES = {"full": "#000000", "lora": "#0072B2", "shira": "#E69F00", "shira-gradient": "#D55E00", "lamda": "#009E73"}
LATE_BYTES = 0.95  # a peak that is lower than this share of the first one at the end of training is worth a word


@dataclasses.dataclass(frozen=True)
class Result:
    """The figures of one way to fine-tune. Losses are in nats per byte, of text that was not trained on.

    `profile` is of the second step, `late_profile` of one after the last: the same but for what was frozen meanwhile.
    """

    variant: str
    learning_rate: float
    new_losses: list[tuple[int, float]]  # (steps done, loss on the new kind of text)
    old_loss_before: float
    old_loss: float
    trained_parameters: int
    peak_bytes: int
    kept_bytes: int
    optimizer_bytes: int
    late_optimizer_bytes: int
    disk_bytes: int
    step_seconds: float
    profile: memsave.MemoryProfile
    late_profile: memsave.MemoryProfile

    @property
    def new_loss(self) -> float:
        """Loss on the new kind of text after the last step."""
        return self.new_losses[-1][1]


def table(results: Sequence[Result]) -> str:
    """One line for the pretrained model, then one per variant."""
    first = results[0]
    header = (
        "variant",
        "rate",
        "new text",
        "old text",
        "trained",
        "peak",
        "kept",
        "optimizer",
        "on disk",
        "median step",
    )
    rows = [header, ("pretrained", "", f"{first.new_losses[0][1]:.4f}", f"{first.old_loss_before:.4f}", *[""] * 6)]
    for r in results:
        rows.append(
            (
                r.variant,
                f"{r.learning_rate:g}",
                f"{r.new_loss:.4f}",
                f"{r.old_loss:.4f}",
                f"{r.trained_parameters:,}",
                _mebibytes(r.peak_bytes),
                _mebibytes(r.kept_bytes),
                _mebibytes(r.optimizer_bytes),
                _mebibytes(r.disk_bytes),
                f"{r.step_seconds * 1e3:.0f} ms",
            )
        )
    return aligned(rows)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.2f} MiB" if size < 2**20 else f"{size / 2**20:.1f} MiB"


def in_words(results: Sequence[Result]) -> list[str]:
    """What the figures say, every number in it computed from them."""
    first, by_name = results[0], {r.variant: r for r in results}
    sentences = []
    base = by_name.get("lora", first)
    sentences += [_against(r, base) for r in results if r is not base]
    for name in ("new", "old"):
        ordered = sorted(results, key=lambda r: getattr(r, f"{name}_loss"))
        losses = ", ".join(f"{r.variant} {getattr(r, f'{name}_loss'):.4f}" for r in ordered)
        before = first.new_losses[0][1] if name == "new" else first.old_loss_before
        sentences.append(f"Loss on the {name} kind of text, lowest first: {losses}; before fine-tuning {before:.4f}.")
    sentences += [
        f"At the end of training {r.variant} peaks at {_mebibytes(r.late_profile.peak_bytes)} and its optimizer holds "
        f"{_mebibytes(r.late_optimizer_bytes)}: what was frozen needs no gradient and no state."
        for r in results
        if r.late_optimizer_bytes < r.optimizer_bytes
    ]
    sentences.append("Each loss comes from one seed: of a small difference, part is chance.")
    return sentences


def _against(result: Result, base: Result) -> str:
    return (
        f"{result.variant} against {base.variant}: {result.peak_bytes / base.peak_bytes:.2f}x the peak, "
        f"{result.kept_bytes / base.kept_bytes:.2f}x the bytes kept for backward, "
        f"{result.optimizer_bytes / base.optimizer_bytes:.2f}x the optimizer's bytes, "
        f"{result.disk_bytes / base.disk_bytes:.2f}x the bytes on disk, "
        f"{result.step_seconds / base.step_seconds:.2f}x the step time; loss on the new text "
        f"{result.new_loss - base.new_loss:+.4f}, on the old {result.old_loss - base.old_loss:+.4f}."
    )


def draw(results: Sequence[Result], path: Path) -> None:
    """Writes a picture: validation losses over the steps, and what the peak of a step consists of."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    losses, peaks = figure.subplots(1, 2)
    _draw_losses(losses, results)
    _draw_peaks(peaks, results)
    figure.savefig(path, dpi=110)


def _draw_losses(axes: Axes, results: Sequence[Result]) -> None:
    for r in results:
        steps, losses = zip(*r.new_losses, strict=True)
        axes.plot(
            steps, losses, color=LINES[r.variant], marker="o", markersize=3.5, label=f"{r.variant} {losses[-1]:.3f}"
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("fine-tuning steps")
    axes.set_ylabel("validation loss (nats per byte)")
    axes.set_title("Text of the new kind")
    axes.legend(frameon=False, title="after the last step")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_peaks(axes: Axes, results: Sequence[Result]) -> None:
    bars = [(r.variant, r.profile) for r in results]
    bars += [
        (f"{r.variant}, end", r.late_profile) for r in results if r.late_profile.peak_bytes < LATE_BYTES * r.peak_bytes
    ]
    bars.sort(key=lambda bar: [r.variant for r in results].index(bar[0].partition(",")[0]))
    names, left = [name for name, _ in bars], [0.0] * len(bars)
    largest = max(profile.peak_bytes for _, profile in bars) / 2**20
    for category, color in COLORS.items():
        sizes = [profile.by_category[category] / 2**20 for _, profile in bars]
        label = category if max(sizes) > 0.005 * largest else None
        axes.barh(names, sizes, left=left, color=color, label=label, height=0.7)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    for name, end in zip(names, left, strict=True):
        axes.annotate(f"{end:.1f}", (end, name), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * largest)
    axes.set_xlabel("live memory at the peak of a step (MiB)")
    axes.set_title("Where the memory of a step is")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
