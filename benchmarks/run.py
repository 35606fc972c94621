"""Runs the benchmark cases: `python -m benchmarks.run [--case NAME ...] [--out DIR]`.

Each case is checked first, and no figure is given for one that fails. All variants of a case run in one process on the
same data and take turns, so that whatever else the machine does slows all alike. Writes <out>/<case>.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from benchmarks.cases import CASES, TrainingCase, VarianceCase
from benchmarks.checks import CheckFailed, check_exact, check_unbiased
from memsave import ops
from memsave.nn.rows import ESTIMATORS, KeepRows

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What was measured of one variant in one forward and backward.

    Attributes:
        kept_bytes: kept for backward after forward; None where it cannot be counted.
        peak_bytes: all live storages at the peak, weights and gradients included.
        median_s, low_s, high_s: time, with the quartiles.
        cpu_s: median CPU time of all threads of the process, which other programs on the machine hardly change.
        error: of the gradients, relative to the plain model's own error where exact; see `checks`.
    """

    variant: str
    kept_bytes: int | None
    peak_bytes: int
    median_s: float
    low_s: float
    high_s: float
    cpu_s: float
    error: float


class Step:
    """Forward and backward of one variant of a case."""

    def __init__(self, case: TrainingCase, index: int, device: str, dtype: torch.dtype | None = None) -> None:
        self.variant = case.variants[index]
        self.forward_of = case.forward
        torch.manual_seed(0)
        self.model = case.model().to(device, dtype or case.dtype).train()
        generator = torch.Generator().manual_seed(1)
        x, dy = (torch.randn(case.shape, generator=generator).to(case.dtype).to(device, dtype) for _ in range(2))
        # A token here and there has a large gradient, as in real training; the same in every variant.
        self.dy = dy * torch.randn(*case.shape[:2], 1, generator=generator).exp().to(dy)
        self.x = x.requires_grad_(case.input_grad)
        self.variant.apply(self.model)

    def forward(self) -> Tensor:
        return self.forward_of(self.model, self.x)

    def clear(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.x.grad = None

    def run(self) -> None:
        self.clear()
        self.forward().backward(self.dy)

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter by name, and of x; on the CPU in fp64."""
        self.run()
        found = {name: p.grad for name, p in self.model.named_parameters()} | {"x": self.x.grad}
        named = {name.replace("block.", ""): grad for name, grad in found.items()}
        return {name: grad.detach().cpu().double() for name, grad in named.items() if grad is not None}

    def sampled(self) -> set[str]:
        """The names of the parameters whose gradient is estimated."""
        return {
            f"{name}.weight"
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Module) and "wta_crs" in module.__dict__.get("_memsave", {})
        }


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def timed(steps: Sequence[Step], repeats: int, device: str) -> list[list[tuple[float, float]]]:
    """(seconds, CPU seconds) of each step, `repeats` times, in turns that begin with another one each time."""
    times: list[list[tuple[float, float]]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            for turn in range(len(steps)):
                index = (repeat + turn) % len(steps)
                synchronize(device)
                start, cpu_start = time.perf_counter(), time.process_time()
                steps[index].run()
                synchronize(device)
                times[index].append((time.perf_counter() - start, time.process_time() - cpu_start))
                steps[index].clear()
    finally:
        gc.enable()
    return times


def run_training(case: TrainingCase, device: str, repeats: int) -> list[Figures]:
    """The figures of every variant. Raises CheckFailed if one of them computes something else than the plain model."""
    steps = [Step(case, index, device) for index in range(len(case.variants))]
    truth = Step(case, 0, device, torch.float64).gradients()
    plain = steps[0].gradients()
    errors = []
    for step in steps:
        exact = check_exact(step.variant.name, step.gradients(), plain, truth, step.sampled(), case.dtype)
        errors.append(check_unbiased(step.variant.name, step, truth) if step.sampled() else exact)
    for step in steps:
        step.clear()
    memory = []
    for step in steps:
        kept_bytes = memsave.saved_bytes(step.forward) if step.variant.counts_kept else None
        memory.append((kept_bytes, memsave.measure(step.run).peak_bytes))
        step.clear()
    figures = []
    for step, (kept_bytes, peak_bytes), times, error in zip(
        steps, memory, timed(steps, repeats, device), errors, strict=True
    ):
        low, median, high = statistics.quantiles((seconds for seconds, _ in times), n=4, method="inclusive")
        figures.append(
            Figures(
                variant=step.variant.name,
                kept_bytes=kept_bytes,
                peak_bytes=peak_bytes,
                median_s=median,
                low_s=low,
                high_s=high,
                cpu_s=statistics.median(cpu_seconds for _, cpu_seconds in times),
                error=error,
            )
        )
    return figures


def run_variance(case: VarianceCase, device: str) -> list[dict[str, Any]]:
    """E|dW - G|^2 / |G|^2 of every estimator, by norms and ratio."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for sigma in case.sigmas:
        x = nn.functional.normalize(torch.randn(case.rows, case.features, generator=generator), dim=1)
        x = x * (sigma * torch.randn(case.rows, 1, generator=generator)).exp()
        signal = nn.functional.normalize(x @ torch.randn(case.features, case.outputs, generator=generator), dim=1)
        noise = nn.functional.normalize(torch.randn(case.rows, case.outputs, generator=generator), dim=1)
        dy = nn.functional.normalize(signal + noise, dim=1)
        x, dy = x.to(device), dy.to(device)
        exact = dy.t() @ x
        for keep_ratio in case.keep_ratios:
            row: dict[str, Any] = {"sigma": sigma, "keep_ratio": keep_ratio}
            for estimator in ESTIMATORS:
                keep, total = KeepRows(keep_ratio, 1, estimator), 0.0
                for draw in range(case.draws):
                    rows, scale = keep.draw(x, torch.tensor(draw, device=device))
                    found = ops.sampled_matmul(dy, ops.gather_rows(x, rows), rows, scale)
                    total += float((found - exact).square().sum())
                row[estimator] = total / case.draws / float(exact.square().sum())
            results.append(row)
    return results


def training_table(figures: Sequence[Figures]) -> str:
    plain = figures[0]
    lines = [f"{'variant':27} {'kept':>11} {'':>5} {'peak':>10} {'':>5} {'step (quartiles)':>24} {'':>5} {'CPU':>5}"]
    for f in figures:
        kept, relative = "not counted", ""
        if f.kept_bytes is not None and plain.kept_bytes:
            kept, relative = f"{f.kept_bytes / MIB:.1f} MiB", f"{f.kept_bytes / plain.kept_bytes:.2f}x"
        peak = f"{f.peak_bytes / MIB:.1f} MiB"
        step = f"{f.median_s * 1e3:.0f} ms ({f.low_s * 1e3:.0f}-{f.high_s * 1e3:.0f})"
        lines.append(
            f"{f.variant:27} {kept:>11} {relative:>5} {peak:>10} "
            f"{f.peak_bytes / plain.peak_bytes:>4.2f}x {step:>24} {f.median_s / plain.median_s:>4.2f}x "
            f"{f.cpu_s / plain.cpu_s:>4.2f}x"
        )
    return "\n".join(lines)


def variance_table(results: Sequence[dict[str, Any]]) -> str:
    names = ["sigma", "keep_ratio", *ESTIMATORS]
    lines = [" ".join(f"{name:>10}" for name in names)]
    lines += [" ".join(f"{row[name]:>10.3g}" for name in names) for row in results]
    return "\n".join(lines)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    names = [line for line in _cpu_info() if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "peft")},
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def describe(case: TrainingCase | VarianceCase) -> dict[str, Any]:
    if isinstance(case, VarianceCase):
        return asdict(case)
    return {"name": case.name, "method": case.method, "title": case.title} | {
        "shape": list(case.shape),
        "dtype": str(case.dtype).removeprefix("torch."),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the number of cases that failed their check."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs="+", choices=names, default=names, help="which cases (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each variant, at least 2 (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads; 1 is steadiest where cores are shared")
    parser.add_argument("--out", type=Path, help="folder for the JSON files; nothing is written without it")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"argument --repeats: quartiles need at least 2, got {options.repeats}")
    torch.set_num_threads(options.threads)
    failed = 0
    for case in (case for case in CASES if case.name in options.case):
        print(f"\n{case.name}: {case.title}")
        try:
            results = run_case(case, options.device, options.repeats)
        except CheckFailed as error:
            failed += 1
            print(f"FAILED, so no figures: {error}", file=sys.stderr)
            continue
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            written = {"case": describe(case), "machine": machine(options.device), "results": results}
            (options.out / f"{case.name}.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return failed


def run_case(case: TrainingCase | VarianceCase, device: str, repeats: int) -> list[dict[str, Any]]:
    """Run and print one case; its results as plain data."""
    if isinstance(case, VarianceCase):
        results = run_variance(case, device)
        print(variance_table(results))
        return results
    figures = run_training(case, device, repeats)
    print(training_table(figures))
    return [asdict(f) for f in figures]


if __name__ == "__main__":
    sys.exit(main())
