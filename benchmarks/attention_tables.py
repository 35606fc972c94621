"""The tables of the benchmark cases of sparse attention."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.formats import MIB, by_size, spread


def attention_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each length for times, bytes kept, and bytes at the peak, beside SDPA's; a column for each way."""
    ways = list(dict.fromkeys(r["way"] for r in data["results"]))
    rows = [["", *ways]]
    for what, cell in (("time", time_cell), ("kept", kept_cell), ("peak", peak_cell)):
        for found in by_size(data):
            by_way = {r["way"]: r for r in found}
            cells = [cell(by_way[way], by_way["SDPA"]) if way in by_way else "-" for way in ways]
            rows.append([f"{found[0]['size']['T']:,} tokens, {what}", *cells])
    return rows


def time_cell(row: dict[str, Any], beside: dict[str, Any]) -> str:
    """Forward and backward, and the ratio of both together; that of forward where there is no backward."""
    forward = duration(row["forward"]["median_s"])
    if row["backward"] is None:
        return f"{forward} ({row['forward']['median_s'] / beside['forward']['median_s']:.2f}x), forward alone"
    return f"{forward} + {duration(row['backward']['median_s'])} ({both_s(row) / both_s(beside):.2f}x)"


def duration(value_s: float) -> str:
    return f"{value_s:.2f} s" if value_s >= 1 else f"{value_s * 1e3:.1f} ms"


def both_s(row: dict[str, Any]) -> float:
    """Seconds of forward and backward."""
    total: float = row["forward"]["median_s"] + row["backward"]["median_s"]
    return total


def kept_cell(row: dict[str, Any], beside: dict[str, Any]) -> str:
    return bytes_cell(row, beside, "kept_bytes")


def peak_cell(row: dict[str, Any], beside: dict[str, Any]) -> str:
    return bytes_cell(row, beside, "peak_bytes")


def bytes_cell(row: dict[str, Any], beside: dict[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    return f"{row[name] / MIB:.1f} MiB ({row[name] / beside[name]:.2f}x)"


def attention_aim_in_words(data: dict[str, Any]) -> str:
    """The aims beside what was measured: time from a length on, and bytes kept at every length."""
    aim = data["case"]["aim"]
    ratios, kept = {}, []
    for found in by_size(data):
        by_way = {r["way"]: r for r in found}
        ours, other = by_way[aim["way"]], by_way[aim["of"]]
        kept.append(ours["kept_bytes"] <= other["kept_bytes"] + codes_bytes(data["case"], found[0]["size"]["T"]))
        if found[0]["size"]["T"] >= aim["from_tokens"]:
            ratios[found[0]["size"]["T"]] = both_s(ours) / both_s(other)
    words = ""
    if ratios:
        missed = [f"{length:,}" for length, ratio in ratios.items() if ratio >= 1]
        measured = ", ".join(f"{ratio:.2f}x" for ratio in ratios.values())
        verdict = f"missed at {', '.join(missed)}" if missed else "met"
        words = f"Aim: {aim['way']} is faster than {aim['of']} from {aim['from_tokens']:,} tokens on; "
        words += f"measured {measured}: {verdict}. "
    verdict = "met" if all(kept) else "missed"
    return f"{words}Aim: it keeps at most what {aim['of']} keeps and the codes of the keys: {verdict}."


def codes_bytes(case: dict[str, Any], length: int) -> int:
    """Four bits for every eight features of every key."""
    count: int = case["heads"][1] * length * -(-case["head_size"] // 16)
    return count


def recall_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each way to choose, single keys first, and a column for each share of the keys."""
    keeps = list(dict.fromkeys(r["keep"] for r in data["results"]))
    found = {(r["size"], r["way"], r["keep"]): r for r in data["results"]}
    rows = [["chosen", "by", *(f"keep = {keep}" for keep in keeps)]]
    for size, way in dict.fromkeys((r["size"], r["way"]) for r in data["results"]):
        cells = [recall_cell(found[size, way, keep]) if (size, way, keep) in found else "-" for keep in keeps]
        rows.append(["keys" if size == 1 else f"blocks of {size}", way, *cells])
    return rows


def recall_cell(row: dict[str, Any]) -> str:
    return f"{spread(row['layers'], '.3f')}, {row['keys']} keys"


def continued_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each variant: losses before and after further training, the latter beside dense of the same seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in data["results"]:
        found.setdefault(run["variant"], {})[run["seed"]] = run
    dense = found["dense"]
    after = f"after {data['case']['further_steps']} further steps"
    rows = [["variant", "converted", after, "more than dense of the same seed", "step", "kept for backward"]]
    for variant, runs in found.items():
        losses = [run["validation_loss"] for run in runs.values()]
        more = [run["validation_loss"] - dense[seed]["validation_loss"] for seed, run in runs.items()]
        before = [run["converted_loss"] for run in runs.values()]
        first = "-" if None in before else spread(before, ".3f")
        beside = "" if runs is dense else spread(more, "+.3f")
        step_s, kept_bytes = (middle(runs, name) for name in ("step_s", "kept_bytes"))
        step = f"{step_s:.2f} s ({step_s / middle(dense, 'step_s'):.2f}x)"
        kept = f"{kept_bytes / MIB:.1f} MiB ({kept_bytes / middle(dense, 'kept_bytes'):.2f}x)"
        rows.append([variant, first, spread(losses, ".3f"), beside, step, kept])
    return rows


def middle(runs: dict[int, dict[str, Any]], name: str) -> float:
    """The median of a figure of some seeds."""
    return statistics.median(run[name] for run in runs.values())


def amount_in_words(data: dict[str, Any]) -> str:
    """How much was trained."""
    case = data["case"]
    if case["kind"] == "recall":
        return f"{case['steps']} steps"
    seeds = len({run["seed"] for run in data["results"]})
    return f"{seeds} seed{'s' if seeds > 1 else ''}, {case['steps']} steps before"
