"""DDP and FSDP2 on two gloo processes, for every row of the case table and a small Llama.

What is provable: with the draws of each rank seeded, two processes do what one process does that runs the ranks'
batches one after the other and averages the gradients, in every step, sampled or not. Where all gradients are exact,
they also do what the plain model does on the joined batch (on the ranks' batches, where it drops out). Where some are
sampled, the first loss is the plain one (the forward is exact); that sampled gradients are right in expectation is
tested where no processes are needed.

Each mode is one pair of processes that trains all rows; a row that fails there fails here by its name.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import memsave
from memsave.nn.routed_ffn import set_balance_scale

from .rows import RANKS, ROWS, STEPS, Row, optimizer_of, seed_draws

fcntl = pytest.importorskip("fcntl", reason="needs file locks of POSIX")
pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch is built without gloo"
)
ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 300
MODES = ["ddp", "fsdp_layer", "fsdp_linear"]
rows = pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])


@dataclass
class Outcome:
    """What a pair of processes left in its folder, and what it printed."""

    mode: str
    folder: Path
    log: str

    def of(self, row: Row) -> dict[str, Any]:
        """The row's result; fails the test with the reason if there is none."""
        path = self.folder / f"{row.id}.pt"
        if not path.exists():
            errors = [error.read_text() for error in sorted(self.folder.glob(f"{row.id}.*.error"))]
            earlier = [error.name for error in sorted(self.folder.glob("*.error"))]
            pytest.fail("\n".join(errors) or f"the processes ended before this row: {earlier}\n{self.log}")
        return torch.load(path)


@pytest.fixture(scope="module", params=MODES)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """All rows in one mode, run once also where several workers of pytest-xdist ask for it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / f"distributed-{request.param}"
    with (shared / f"{request.param}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            run_processes("tests.distributed.worker", [request.param], RANKS, folder)
    return Outcome(request.param, folder, "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log.*"))))


def run_processes(module: str, arguments: list[str], ranks: int, folder: Path) -> None:
    """Run `module` with the arguments, a rank and the folder, in as many processes; if they hang, the log says so."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments, str(rank), str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=(folder / f"log.{rank}").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        for process in processes:
            process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        (folder / "log.end").write_text(f"ended after {LIMIT_SECONDS} s: the processes hang, or the machine is slow")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def one_process(row: Row, model: nn.Module, *, joined: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final weights of one process: the ranks' batches joined, or one after the other."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        batches = [row.batch(step, rank) for rank in range(RANKS)]
        if joined:
            batches = [torch.cat(batches) if batches[0].dim() > 1 else torch.stack(batches)]
        parts = []
        set_balance_scale(model, 1 / len(batches))  # each rank has a balance loss of its own
        for rank, batch in enumerate(batches):
            seed_draws(step, rank)
            parts.append(model(batch) / len(batches))
            parts[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(sum(part.item() for part in parts)))
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def assert_close(actual: dict[str, Any], losses: list[float], weights: dict[str, Tensor], tolerance: float) -> None:
    assert actual["losses"] == pytest.approx(losses, rel=tolerance)
    assert list(actual["weights"]) == list(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(actual["weights"][name], weight, rtol=tolerance, atol=tolerance)


@rows
def test_two_processes_do_what_one_does_with_the_same_draws(outcome: Outcome, row: Row) -> None:
    actual = outcome.of(row)
    assert not actual["ranks differ"]
    sampled_alike = row.exact or row.exact_in != outcome.mode
    alone = row.converted() if sampled_alike else row.plain()
    assert_close(actual, *one_process(row, alone, joined=False), row.tolerance)
    start = dict(row.converted().named_parameters())
    moved = [name for name, weight in actual["weights"].items() if not torch.equal(weight, start[name])]
    assert moved == [name for name, p in row.converted().named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.exact is not None], ids=[r.id for r in ROWS if r.exact is not None]
)
def test_two_processes_do_what_the_plain_model_does_on_the_joined_batch(outcome: Outcome, row: Row) -> None:
    actual = outcome.of(row)
    losses, weights = one_process(row, row.plain(), joined=not row.random)
    assert actual["losses"][0] == pytest.approx(losses[0], rel=row.tolerance)
    if row.exact or row.exact_in == outcome.mode:
        assert_close(actual, losses, weights, row.tolerance)
    else:
        assert actual["losses"][1:] != pytest.approx(losses[1:], rel=row.tolerance), "nothing was sampled"


@rows
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_saved_is_loaded_bit_for_bit(outcome: Outcome, row: Row) -> None:
    """By memsave.load, and where the keys are the plain model's, by load_state_dict and distributed checkpoints."""
    weights = outcome.of(row)["weights"]
    loaded = [memsave.load(outcome.folder / f"{row.id}.memsave", row.plain())]
    if row.exact is not None:
        gathered, sharded = row.plain(), row.plain()
        gathered.load_state_dict(outcome.of(row)["gathered"])
        state = {"model": sharded.state_dict()}
        dcp.load(state, checkpoint_id=outcome.folder / f"{row.id}.dcp", no_dist=True)
        sharded.load_state_dict(state["model"])
        loaded += [gathered, sharded]
    for model in loaded:
        found = dict(model.named_parameters())
        assert list(found) == list(weights)
        assert [name for name, weight in weights.items() if not torch.equal(found[name], weight)] == []


@rows
def test_wrapped_models_are_refused_with_advice(outcome: Outcome, row: Row) -> None:
    said = outcome.of(row)["refusals"]
    wrapper = "DistributedDataParallel" if outcome.mode == "ddp" else "FSDPModule"
    for operation in ("convert_model", "restore_model"):
        assert f"is wrapped in {wrapper}: convert, restore or estimate the model before" in said[operation]
        assert said[operation].endswith("The model was not changed.")
    assert said["classes"] == "unchanged"
    if outcome.mode != "ddp":
        sharded = outcome.of(row)["sharded"]
        assert "it is sharded; gather the weights by get_model_state_dict" in sharded
        assert sharded.endswith("Nothing was written.") and not (outcome.folder / "never").exists()
