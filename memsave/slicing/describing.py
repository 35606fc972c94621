"""A plan as a table, and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text import aligned

MOST_LABELS = 24

if TYPE_CHECKING:
    from .plan import Plan


def describe(plan: Plan) -> str:
    """The table that `print(plan)` shows."""
    from ..memory.profile import format_bytes

    ratio = plan.plain_peak_bytes / max(plan.peak_bytes, 1)
    extra = plan.macs / max(plan.plain_macs, 1) - 1
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in plan.inputs)
    lines = [
        f"{plan.module or '(the model)'}, {plan.schedule}, called with {shapes}:",
        f"  peak {format_bytes(plan.plain_peak_bytes)} -> {format_bytes(plan.peak_bytes)} ({ratio:.1f}x less; inputs "
        f"and weights not counted), multiply-accumulates {plan.plain_macs:,} ({extra:+.1%})",
    ]
    rows = [("from", "to", "ops", "computed", "peak", "extra MACs")]
    for stage in plan.stages:
        more = f"{stage.extra_macs / max(stage.macs - stage.extra_macs, 1):.1%}"
        cells = (stage.first or "(the model)", stage.last or "(the model)", str(stage.ops), stage.how)
        rows.append((*cells, format_bytes(stage.peak_bytes), more))
    lines += aligned(rows)
    if plan.ends:
        lines.append("  cannot be computed in parts:")
        lines += [f"    {where}: {reason}" for where, reason in plan.ends.items()]
    if plan.calls:
        planned = plan.calls.get("planned", 0)
        plain = [f"{count} plain ({reason})" for reason, count in plan.calls.items() if reason != "planned"]
        lines.append(f"  calls so far: {', '.join([f'{planned} planned', *plain])}")
    return "\n".join(lines)


def describe_halos(plan: Plan) -> str:
    """The table that `redistribution()` shows, the costliest op first."""
    rows = [("module", "kernel", "stride", "halo rows of the stage's input", "MACs done twice at each tile border")]
    for halo in sorted(plan.halos, key=lambda halo: -halo.extra_macs):
        cells = (halo.module or "(the model)", str(halo.kernel), str(halo.stride), str(halo.halo_rows))
        rows.append((*cells, f"{halo.extra_macs:,}"))
    if len(rows) == 1:
        return "no op with a window runs in parts: there is no halo"
    return "\n".join(aligned(rows))


def plot(plan: Plan, path: Any) -> Path:
    """Bars for each layer, before and after, as in MCUNetV2's figure of the memory of each block."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot() needs matplotlib, which is missing: pip install 'memsave[plot]'") from error
    from ..memory.profile import format_bytes

    unit, unit_bytes = ("MiB", 2**20) if plan.plain_peak_bytes >= 2**20 else ("KiB", 2**10)
    before = [layer.before_bytes / unit_bytes for layer in plan.layers]
    after = [layer.after_bytes / unit_bytes for layer in plan.layers]
    count = len(plan.layers)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    said = f"whole: peak {format_bytes(plan.plain_peak_bytes)}"
    axes.bar(range(count), before, width=1.0, color="#c6cbd6", label=said)
    edges = [place - 0.5 for place in range(count + 1)]
    said = f"{plan.schedule}: peak {format_bytes(plan.peak_bytes)}"
    axes.stairs(after, edges, baseline=None, color="#D55E00", linewidth=1.8, label=said)
    start = 0
    for stage in plan.stages:
        axes.axvline(start - 0.5, color="gray", linewidth=0.6, linestyle=":")
        start += stage.ops
    ticks = range(0, count, max(1, -(-count // MOST_LABELS)))
    axes.set_xticks(ticks, [plan.layers[i].name for i in ticks], rotation=40, ha="right", fontsize=7)
    axes.set_xlim(-0.5, max(count - 0.5, 0.5))
    axes.set_xlabel("ops in the order in which they run; dotted lines part the stages")
    axes.set_ylabel(f"live bytes while the op runs ({unit})")
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in plan.inputs)
    axes.set_title(f"{plan.module or 'the model'}, called with {shapes}", fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return Path(path)
