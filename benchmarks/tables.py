"""Writes the tables and plots of the docs from the result files: `python -m benchmarks.tables`.

In README.md or a page of docs/, `<!-- results: cpu/NAME -->` is followed by the table of
benchmarks/results/cpu/NAME.json, up to `<!-- end -->`; `<!-- methods: cpu -->` by the table of all methods, and
`<!-- api -->` by the reference of every public name.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import result_files
from benchmarks.api_page import api
from benchmarks.attention_tables import (
    amount_in_words,
    attention_aim_in_words,
    attention_rows,
    continued_rows,
    recall_rows,
)
from benchmarks.formats import by_size, in_bytes, in_words, mebibytes, seconds, spread
from benchmarks.overview import overview
from benchmarks.result_files import RESULTS, ResultError

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"<!-- results: (?P<file>\S+) -->\n.*?<!-- end -->", re.DOTALL)
_API = re.compile(r"<!-- api -->\n.*?<!-- end -->", re.DOTALL)
_METHODS = re.compile(r"<!-- methods: (?P<folder>\S+) -->\n.*?<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: str, results: Path = RESULTS) -> str:
    """The text of a page with every table as its result file has it. Raises ResultError for a file of no use."""

    def fill(block: re.Match[str]) -> str:
        data = result_files.read(results / f"{block['file']}.json")
        return f"<!-- results: {block['file']} -->\n{table(data)}\n<!-- end -->"

    def fill_methods(block: re.Match[str]) -> str:
        return f"<!-- methods: {block['folder']} -->\n{overview(results / block['folder'])}\n<!-- end -->"

    def fill_api(_: re.Match[str]) -> str:
        return f"<!-- api -->\n{api()}\n<!-- end -->"

    return _API.sub(fill_api, _METHODS.sub(fill_methods, _BLOCK.sub(fill, page)))


def table(data: dict[str, Any]) -> str:
    """The Markdown table of one result, and where it was measured."""
    header, *body = ROWS[data["case"]["kind"]](data)
    lines = [" | ".join(cells) for cells in (header, ["---"] * len(header), *body)]
    return "\n".join([*(f"| {line} |" for line in lines), "", footnote(data)])


def footnote(data: dict[str, Any]) -> str:
    case, made = data["case"], data["machine"]
    setting = f"{case['title'][0].upper()}{case['title'][1:]}. "
    if "shape" in case:
        batch, length, *width = case["shape"]
        setting += f"{batch} x {length} tokens{f', d = {width[0]}' if width else ''}. "
    if "text" in case:
        setting += f"{training_in_words(data)}. "
    aim = ""
    if case.get("aim") and case["aim"]["device"] == device_type(data):
        words = attention_aim_in_words if case["kind"] == "sparse_attention" else aim_in_words
        aim = f" {words(data)}"
    return f"{setting}{device_in_words(data)}, torch {made['versions']['torch']}, {made['date']}.{aim}"


def device_type(data: dict[str, Any]) -> str:
    return "cpu" if data["machine"]["device"] == "cpu" else "cuda"


def device_in_words(data: dict[str, Any]) -> str:
    made = data["machine"]
    if device_type(data) == "cuda":
        return made["device"]
    return f"{made['cpu']}, {made['threads']} thread" + ("s" if made["threads"] > 1 else "")


def model_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each variant, beside the first; CPU time on the CPU, the allocator's peak on a GPU."""
    results = data["results"]
    on_gpu = device_type(data) == "cuda"
    rows = [["variant", "kept for backward", "peak", "step", "allocator's peak" if on_gpu else "CPU time"]]
    for r in results:
        last = f"{r['cpu_s'] / results[0]['cpu_s']:.2f}x"
        if on_gpu:
            last = mebibytes(r, results[0], "allocator_peak_bytes")
        kept, peak = (mebibytes(r, results[0], name) for name in ("kept_bytes", "peak_bytes"))
        step = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / results[0]['median_s']:.2f}x)"
        rows.append([r["variant"], kept, peak, step, last])
    return rows


def adapter_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each way to fine-tune, beside the first."""
    first = data["results"][0]
    rows = [["", "trained", "kept by the layers", "peak", "step", "optimizer", "file"]]
    for r in data["results"]:
        kept, peak = (mebibytes(r, first, name) for name in ("kept_layers_bytes", "peak_bytes"))
        step = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / first['median_s']:.2f}x)"
        sizes = [in_bytes(r[name]) for name in ("optimizer_bytes", "file_bytes")]
        rows.append([r["variant"], f"{r['trained']:,}", kept, peak, step, *sizes])
    return rows


def variance_rows(data: dict[str, Any]) -> list[list[str]]:
    rows = [["sigma", "keep_ratio", "pps", "wta_crs", "crs", "pps / wta_crs", "pps / crs"]]
    for r in data["results"]:
        pps, wta_crs, crs = r["pps"], r["wta_crs"], r["crs"]
        ratios = [f"{pps / wta_crs:.2f}", f"{pps / crs:.2f}"]
        rows.append([str(r["sigma"]), str(r["keep_ratio"]), f"{pps:.3g}", f"{wta_crs:.3g}", f"{crs:.3g}", *ratios])
    return rows


def quality_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each variant: its validation losses, and their differences from plain of the same seed."""
    found = by_variant(data)
    plain = found["none", "plain"]
    loss = "validation loss, mean (lowest to highest)"
    rows = [["sampled linears", "variant", loss, "more than plain of the same seed"]]
    for (linears, variant), runs in found.items():
        losses = [run["validation_loss"] for run in runs.values()]
        more = [run["validation_loss"] - plain[seed]["validation_loss"] for seed, run in runs.items()]
        rows.append([linears, variant, spread(losses, ".3f"), "" if runs is plain else spread(more, "+.3f")])
    return rows


def by_variant(data: dict[str, Any]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The runs of a quality case by their linears and variant, each by its seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for run in data["results"]:
        found.setdefault((run["linears"], run["variant"]), {})[run["seed"]] = run
    return found


def grad_norms_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each training and epoch: the mean over the kinds of linears, and their range."""
    weights = {
        "remembered": "half remembered norms (memsave)",
        "norms alone": "remembered norms alone (paper)",
        "best": "the norms themselves (best)",
    }
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for result in data["results"]:
        found.setdefault((result["training"], result["epoch"]), []).append(result)
    rows = [["training", "epoch", "without a memory", *weights.values()]]
    for (training, epoch), kinds in found.items():
        ratios = [spread([kind[way] for kind in kinds], ".2f", "x") for way in weights]
        rows.append([training, str(epoch), spread([kind["none"] for kind in kinds], ".2f"), *ratios])
    return rows


def training_in_words(data: dict[str, Any]) -> str:
    """On what the demo's model was trained."""
    case = data["case"]
    if case["kind"] == "quality":
        count = f"{len({run['seed'] for run in data['results']})} seeds, {case['steps']} steps"
    elif case["kind"] in ("continued", "recall"):
        count = amount_in_words(data)
    else:
        count = f"{case['batches']} batches"
    amount = f"{count} of {case['batch']} x {case['length']} bytes"
    return f"The demo's {case['size']} model, {amount}, {case['text']['source']}"


def op_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each contender and a column for each size; the first contender is 1.00x."""
    sizes = by_size(data)
    names = list(dict.fromkeys(r["contender"] for r in data["results"]))
    rows = [["", *(in_words(figures[0]["size"]) or "one call" for figures in sizes)]]
    for name in names:
        cells = [next((op_cell(r, figures[0]) for r in figures if r["contender"] == name), "-") for figures in sizes]
        rows.append([name, *cells])
    return rows


def op_cell(row: dict[str, Any], first: dict[str, Any]) -> str:
    ratio = row["median_s"] / first["median_s"]
    return f"{seconds(row['median_s'])} ({ratio:{'.2f' if ratio >= 0.1 else '.1g'}}x), {in_bytes(row['peak_bytes'])}"


def kept_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each architecture: what the plain and the converted model keep, in every dtype."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in data["results"]))
    rows = [["architecture", *(cell for dtype in dtypes for cell in (f"{dtype}: plain", "converted", "ratio"))]]
    for name in dict.fromkeys(r["architecture"] for r in data["results"]):
        found = {r["dtype"]: r for r in data["results"] if r["architecture"] == name}
        dropout = next(iter(found.values()))["dropout"]
        row = [f"{name}, dropout {dropout}" if dropout else name]
        for plain_bytes, converted_bytes in ((found[d]["plain_bytes"], found[d]["converted_bytes"]) for d in dtypes):
            row += [in_bytes(plain_bytes), in_bytes(converted_bytes), f"{converted_bytes / plain_bytes:.2f}x"]
        rows.append(row)
    return rows


def compression_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each ratio and a column for each way, and last the CPU time that compressing took."""
    ways = by_way(data)
    total = f"{data['results'][0]['of_parameters'] / 1e6:.2f}M"
    rows = [["ratio", f"parameters kept, of {total}", *ways]]
    for ratio in dict.fromkeys(r["ratio"] for r in data["results"]):
        found = [next((r for r in results if r["ratio"] == ratio), None) for results in ways.values()]
        kept = {f"{r['parameters'] / 1e6:.2f}M" for r in found if r}
        counts = " to ".join(dict.fromkeys((min(kept), max(kept))))
        rows.append([str(ratio), counts, *(closeness_cell(r) if r else "-" for r in found)])
    times = [[r["cpu_s"] for r in results] for results in ways.values()]
    return [*rows, ["CPU time to compress", "", *(f"{statistics.median(t):.1f} s" for t in times)]]


def by_way(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a compression case by the way of compressing, in the order of the ratios."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(data["results"], key=lambda row: row["ratio"]):
        found.setdefault(row["way"], []).append(row)
    return found


def closeness_cell(row: dict[str, Any]) -> str:
    return f"{row['mean_cosine']:.3f} ({row['lowest_cosine']:.3f}), {row['rank_correlation']:.3f}"


def streaming_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each size, a column for each way: bytes and time, each beside those of plain low-rank layers."""
    ways = list(dict.fromkeys(r["way"] for r in data["results"]))
    rows = [["", *ways]]
    for found in by_size(data):
        beside = next(r for r in found if r["way"] == "low-rank")
        cells = [next((streaming_cell(r, beside) for r in found if r["way"] == way), "-") for way in ways]
        rows.append([in_words(beside["size"]), *cells])
    return rows


def streaming_cell(row: dict[str, Any], beside: dict[str, Any]) -> str:
    time = f"{row['median_s'] * 1e3:.1f} ms ({row['median_s'] / beside['median_s']:.2f}x)"
    return f"{mebibytes(row, beside, 'temporary_bytes')}, {time}"


def decoding_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each length of the past, a column for each way, beside plain low-rank layers."""
    ways = list(dict.fromkeys(r["way"] for r in data["results"]))
    rows = [["", *ways]]
    for found in by_size(data):
        beside = next(r for r in found if r["way"] == "low-rank")
        cells = []
        for row in found:
            ratios = (row[name] / beside[name] for name in ("cache_bytes", "median_s"))
            held, time = (f"({ratio:.2f}x)" for ratio in ratios)
            cells.append(f"{row['cache_bytes']:,.0f} B {held}, {row['median_s'] * 1e3:.2f} ms {time}")
        rows.append([in_words(beside["size"]), *cells])
    return rows


def convolution_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each way to run the model, beside the first."""
    first = data["results"][0]
    rows = [["", "allocated at the peak", "multiply-accumulates", "time", "largest difference"]]
    for r in data["results"]:
        macs = f"{r['macs'] / 1e9:.2f}G ({r['macs'] / first['macs']:.3f}x)"
        time = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / first['median_s']:.2f}x)"
        difference = "-" if r is first else f"{r['difference']:.1g}"
        rows.append([r["way"], mebibytes(r, first, "peak_bytes"), macs, time, difference])
    return rows


def routed_ffn_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each way to run the block, beside the first."""
    first = data["results"][0]
    rows = [["", "kept for backward", "allocated at the peak", "multiply-accumulates", "time", "CPU time"]]
    for r in data["results"]:
        kept, peak = (mebibytes(r, first, name) for name in ("kept_bytes", "peak_bytes"))
        macs = f"{r['macs'] / 1e9:.1f}G ({r['macs'] / first['macs']:.2f}x)"
        time = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / first['median_s']:.2f}x)"
        rows.append([r["way"], kept, peak, macs, time, f"{r['cpu_s'] / first['cpu_s']:.2f}x"])
    return rows


def forward_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each variant, beside the first."""
    first = data["results"][0]
    rows = [["variant", "temporary", "time", "CPU time"]]
    for r in data["results"]:
        time = f"{r['median_s'] * 1e3:.0f} ms ({r['median_s'] / first['median_s']:.2f}x)"
        rows.append([r["variant"], mebibytes(r, first, "temporary_bytes"), time, f"{r['cpu_s'] / first['cpu_s']:.2f}x"])
    return rows


def estimate_rows(data: dict[str, Any]) -> list[list[str]]:
    """A row for each tool."""
    rows = [["", "predicted peak", "time", "CPU time", "largest size of the process"]]
    for r in data["results"]:
        peak, process = (f"{r[name] / 2**30:.2f} GiB" for name in ("peak_bytes", "process_bytes"))
        rows.append([r["tool"], peak, f"{r['s']:.1f} s", f"{r['cpu_s']:.1f} s", process])
    return rows


def aim_in_words(data: dict[str, Any]) -> str:
    """The aim beside what was measured, at every size."""
    aim = data["case"]["aim"]
    ratios = []
    for figures in by_size(data):
        times = {r["contender"]: r["median_s"] for r in figures}
        ratios.append(times[aim["contender"]] / times[aim["of"]])
    measured = ", ".join(f"{ratio:.2f}x" for ratio in ratios)
    verdict = "met" if max(ratios) <= aim["at_most"] else "missed"
    wanted = f"{aim['contender']} takes at most {aim['at_most']:.2f}x of {aim['of']}"
    return f"Aim: {wanted}; measured {measured}: {verdict}."


ROWS: dict[str, Callable[[dict[str, Any]], list[list[str]]]] = {
    "training": model_rows,
    "step": model_rows,
    "methods": model_rows,
    "forward": forward_rows,
    "streaming": streaming_rows,
    "decoding": decoding_rows,
    "convolution": convolution_rows,
    "routed_ffn": routed_ffn_rows,
    "adapters": adapter_rows,
    "op": op_rows,
    "loss": op_rows,
    "variance": variance_rows,
    "estimate": estimate_rows,
    "kept": kept_rows,
    "compression": compression_rows,
    "quality": quality_rows,
    "grad_norms": grad_norms_rows,
    "sparse_attention": attention_rows,
    "recall": recall_rows,
    "continued": continued_rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills all pages and draws all plots, or with an error none of them."""
    from benchmarks import plots

    try:
        texts = {page: filled(page.read_text(encoding="utf-8")) for page in pages()}
        drawn = plots.all_plots()
    except ResultError as error:
        print(f"error: {error} No page was changed.", file=sys.stderr)
        return 2
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    for plot in drawn:
        plot.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
