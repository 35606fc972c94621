"""Measures predictions: each tool in a process of its own, so that its time and memory are its own."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import textwrap
from typing import Any

from benchmarks.cases.estimates import EstimateCase
from benchmarks.checks import CheckFailed

TOLERANCE = 0.01
MAX_ROUNDS = 3

_COMMON = """
    import json, resource, sys, time, torch, transformers
    shape, tokens = json.loads(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.bfloat16)
    config = transformers.LlamaConfig(**shape, use_cache=False)

    def timed(predict):
        start, cpu_start = time.perf_counter(), time.process_time()
        peak_bytes = predict()
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        process_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"s": seconds, "cpu_s": cpu_s, "peak_bytes": peak_bytes, "process_bytes": process_bytes}))
"""
_MEMSAVE = """
    import memsave
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    timed(lambda: memsave.estimate(model, batch, optimizer="adamw").peak_bytes)
"""
# torch's tool follows what it is given to run, so the fake tensors and the two steps are ours.
_MEM_TRACKER = """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def predict():
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            step()
            tracker.reset_mod_stats()
            step()
        return sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values())

    with FakeTensorMode():
        model = transformers.LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        timed(predict)
"""
TOOLS = {"memsave.estimate": _MEMSAVE, "torch's MemTracker": _MEM_TRACKER}


def run_estimate_case(case: EstimateCase, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The figures of each tool: medians of the seconds, the predicted peak and the largest size of its process.

    Raises:
        CheckFailed: the predictions differ by more than one percent.
    """
    results = []
    for name, program in TOOLS.items():
        runs = [_run(program, case) for _ in range(min(rounds, MAX_ROUNDS))]
        results.append({"tool": name} | {key: statistics.median(run[key] for run in runs) for key in runs[0]})
    ours, theirs = (row["peak_bytes"] for row in results)
    if abs(ours - theirs) > TOLERANCE * theirs:
        raise CheckFailed(f"{case.name}: {' and '.join(TOOLS)} predict peaks of {ours:.0f} and {theirs:.0f} bytes")
    return results, {}


def _run(program: str, case: EstimateCase) -> dict[str, Any]:
    text = textwrap.dedent(_COMMON) + textwrap.dedent(program)
    command = [sys.executable, "-c", text, json.dumps(dict(case.shape)), str(case.tokens)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}: a prediction failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
