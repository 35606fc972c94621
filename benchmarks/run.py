"""Runs the benchmark cases: `python -m benchmarks.run [--case NAME ...] [--out DIR]`.

Each case is checked first, and no figure is given for one that fails. All that is compared runs in one process on the
same data and takes turns, so that whatever else the machine does slows all alike. Writes <out>/<case>.json, or with
`--bundle` one file that holds them all, after every case anew. A case that trains for long writes its file after every
training, and goes on with the file that is there.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import result_files, tables
from benchmarks.cases import CASES, Case
from benchmarks.cases.adapters import AdapterCase
from benchmarks.cases.compression import CompressionCase
from benchmarks.cases.convolution import ConvolutionCase
from benchmarks.cases.estimates import EstimateCase
from benchmarks.cases.kept import KeptCase
from benchmarks.cases.losses import LossCase
from benchmarks.cases.methods import MethodsCase
from benchmarks.cases.op_case import OpCase
from benchmarks.cases.quality import QUALITY_CASES, GradNormsCase, QualityCase
from benchmarks.cases.routed_ffn import RoutedFFNCase
from benchmarks.cases.sparse_attention import AttentionCase, ContinuedCase, RecallCase
from benchmarks.cases.streaming import DecodingCase, StreamingCase
from benchmarks.cases.tiles import tile_cases
from benchmarks.cases.training import ForwardCase, StepCase, TrainingCase
from benchmarks.cases.variance import VarianceCase
from benchmarks.checks import CheckFailed
from benchmarks.result_files import ResultError
from benchmarks.runners import continued, quality
from benchmarks.runners.adapters import run_adapter_case
from benchmarks.runners.compression import run_compression_case
from benchmarks.runners.convolution import run_convolution_case
from benchmarks.runners.estimates import run_estimate_case
from benchmarks.runners.forward import run_forward_case
from benchmarks.runners.grad_norms import run_grad_norms_case
from benchmarks.runners.kept import run_kept_case
from benchmarks.runners.models import run_model_case
from benchmarks.runners.ops import run_op_case
from benchmarks.runners.recall import run_recall_case
from benchmarks.runners.routed_ffn import run_routed_ffn_case
from benchmarks.runners.sparse_attention import run_attention_case
from benchmarks.runners.streaming import run_decoding_case, run_streaming_case
from benchmarks.runners.variance import run_variance_case
from benchmarks.sentences import PackageMissing

RUNNERS: dict[type[Case], Callable[..., tuple[list[dict[str, Any]], dict[str, str]]]] = {
    TrainingCase: run_model_case,
    StepCase: run_model_case,
    MethodsCase: run_model_case,
    ForwardCase: run_forward_case,
    AdapterCase: run_adapter_case,
    OpCase: run_op_case,
    LossCase: run_op_case,
    VarianceCase: run_variance_case,
    EstimateCase: run_estimate_case,
    KeptCase: run_kept_case,
    CompressionCase: run_compression_case,
    StreamingCase: run_streaming_case,
    DecodingCase: run_decoding_case,
    ConvolutionCase: run_convolution_case,
    RoutedFFNCase: run_routed_ffn_case,
    AttentionCase: run_attention_case,
    GradNormsCase: run_grad_norms_case,
    RecallCase: run_recall_case,
}
# Those that go on where they were: given a case and its results so far, they give each further one as it is there.
RESUMED: dict[type[Case], Callable[..., Iterator[dict[str, Any]]]] = {
    QualityCase: quality.further_runs,
    ContinuedCase: continued.further_runs,
}


def run_case(case: Case, options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """Check and measure one case: the content of its result file."""
    case = case.at_toy_size() if options.tiny else case
    if type(case) in RESUMED:
        return resume_case(case, options, record)
    results, left_out = RUNNERS[type(case)](case, options.device, options.repeats)
    return result_files.result(case, options.device, options.tiny, results, left_out)


def resume_case(case: Case, options: argparse.Namespace, record: Record) -> dict[str, Any]:
    """Measure what the case's result file lacks. A file that lacks nothing stays as it is, with its date and machine.

    Raises:
        ResultError: the results of the file were made with other settings.
    """
    new = result_files.result(case, options.device, options.tiny, [], {})
    data = record.begun(new)
    for row in RESUMED[type(case)](case, data["results"]):
        data = new | {"results": [*data["results"], row]}
        record.add(data)
    return data


class Record:
    """Collects results and writes each as soon as it exists.

    Attributes:
        left_out: by case, why it was not run or gave no figures.
        failed: how many cases failed.
    """

    def __init__(self, folder: Path | None, bundle: Path | None, tiny: bool) -> None:
        self.folder = folder
        self.bundle = bundle
        self.results: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.failed = 0
        self.tiny = tiny
        self._write_bundle()

    def begun(self, new: dict[str, Any]) -> dict[str, Any]:
        """The result to go on with: the one that an earlier run wrote, or `new`."""
        return result_files.begun(self.folder / f"{new['case']['name']}.json", new) if self.folder else new

    def add(self, data: dict[str, Any]) -> None:
        name = data["case"]["name"]
        self.results[name] = data
        if self.folder:
            result_files.write(self.folder / f"{name}.json", data)
        self._write_bundle()

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        print(f"LEFT OUT: {name}: {reason}", flush=True)
        self._write_bundle()

    def fail(self, name: str, reason: str) -> None:
        self.failed += 1
        print(f"FAILED, so no figures: {reason}", file=sys.stderr, flush=True)
        self.leave_out(name, reason)

    def _write_bundle(self) -> None:
        if self.bundle:
            content = {"format": result_files.FORMAT, "tiny": self.tiny, "left_out": self.left_out}
            result_files.write(self.bundle, content | {"results": self.results})


def run_all(cases: Sequence[Case], options: argparse.Namespace, record: Record) -> None:
    """Run the cases in order, and start none for which too little of the time budget is left."""
    deadline = time.monotonic() + options.budget_s
    for case in cases:
        expected_s = 0.0 if options.tiny else case.expected_s
        left_s = deadline - time.monotonic()
        if left_s <= 0 or left_s < expected_s < math.inf:
            reason = f"{max(0, left_s):.0f} s of the time budget were left, it takes about {expected_s:.0f} s"
            record.leave_out(case.name, reason)
            continue
        print(f"\n{case.name}: {case.title}", flush=True)
        start, cpu_start = time.monotonic(), time.process_time()
        try:
            data = run_case(case, options, record)
        except PackageMissing as missing:
            record.leave_out(case.name, str(missing))
        except (CheckFailed, ResultError) as error:
            record.fail(case.name, str(error))
        except Exception as error:  # one case that breaks must not take the others' figures with it
            traceback.print_exc()
            record.fail(case.name, f"{type(error).__name__}: {error}")
        else:
            print(tables.table(data), flush=True)
            for name, reason in data["left_out"].items():
                print(f"left out: {name}: {reason}")
            record.add(data)
            took_s, cpu_s = time.monotonic() - start, time.process_time() - cpu_start
            print(f"took {took_s:.0f} s, {cpu_s:.0f} s of CPU time", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of cases that failed."""
    options = parse_options(arguments)
    torch.set_num_threads(options.threads)
    record = Record(options.out, options.bundle, options.tiny)
    run_all(options.cases, options, record)
    return record.failed


def left_to_long(case: Case, options: argparse.Namespace) -> bool:
    """Whether a case is too long for a run of all cases on the CPU in twenty minutes. A GPU has a budget instead."""
    return options.suite == "cases" and options.device == "cpu" and not options.tiny and case.long


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    suites = {"cases": lambda: CASES, "quality": lambda: QUALITY_CASES, "tiles": tile_cases}
    words = "quality: those that train for long; tiles: those of the GPU kernels"
    parser.add_argument("--suite", choices=suites, default="cases", help=words)
    parser.add_argument("--long", action="store_true", help="also cases that take minutes each: two hours in all")
    parser.add_argument("--case", nargs="+", metavar="NAME", help="which cases (default: all of this device)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each variant, at least 2 (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; 1 is steadiest where cores are shared")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no case that would end after so long")
    parser.add_argument("--tiny", action="store_true", help="a dry run at toy size, whose figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; nothing is written without it")
    parser.add_argument("--bundle", type=Path, help="one file for all results")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"argument --repeats: quartiles need at least 2, got {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA or ROCm device. Nothing was run.")
    cases = {case.name: case for case in suites[options.suite]() if options.device in case.devices}
    unknown = [name for name in options.case or () if name not in cases]
    if unknown:
        parser.error(f"argument --case: no {', '.join(unknown)} on {options.device}; there are {', '.join(cases)}")
    chosen = options.case or [name for name, case in cases.items() if options.long or not left_to_long(case, options)]
    options.cases = [cases[name] for name in chosen]
    return options


if __name__ == "__main__":
    sys.exit(main())
