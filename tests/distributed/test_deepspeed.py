"""DeepSpeed's ZeRO-3 on two gloo processes: what one process does, with the ranks' batches one after the other."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import memsave

from .deepspeed_worker import ZERO_ROWS, single
from .rows import RANKS, Row
from .test_rows import assert_close, one_process, run_processes

pytest.importorskip("transformers", reason="needs transformers (pip install 'memsave[hf]')")
pytestmark = [
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (pip install deepspeed)"),
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch lacks gloo"),
]
rows = pytest.mark.parametrize("row", ZERO_ROWS, ids=[row.id for row in ZERO_ROWS])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pair of processes left."""
    made = tmp_path_factory.mktemp("zero3")
    run_processes("tests.distributed.deepspeed_worker", [], RANKS, made)
    return made


def left(folder: Path, row: Row) -> dict[str, Any]:
    path = folder / f"{row.id}.pt"
    if not path.exists():
        found = [*sorted(folder.glob("*.error")), *sorted(folder.glob("log.*"))]
        pytest.fail("\n".join(file.read_text()[-3000:] for file in found))
    return torch.load(path)


@rows
def test_two_processes_do_what_one_does_with_the_same_draws(folder: Path, row: Row) -> None:
    actual = left(folder, row)
    assert set(actual["sharded"]) == set(actual["weights"]), "the parameters were whole outside of the forward"
    losses, weights = one_process(row, single(row), joined=False)
    if "wta_crs" in row.id:  # linears that read one tensor get it as several here, and draw rows of their own
        assert actual["losses"][0] == pytest.approx(losses[0], rel=1e-3)
        assert actual["losses"][1:] == pytest.approx(losses[1:], rel=0.05)
    else:
        assert_close(actual, losses, weights, 1e-3)
    start = dict(single(row).named_parameters())
    trained = {name for name, parameter in start.items() if parameter.requires_grad}
    assert {name for name, weight in actual["weights"].items() if not torch.equal(weight, start[name])} == trained


@rows
def test_what_is_saved_is_loaded_bit_for_bit(folder: Path, row: Row) -> None:
    weights = left(folder, row)["weights"]
    loaded = memsave.load(folder / f"{row.id}.memsave", row.plain().float())
    assert {name: bool(torch.equal(p, weights[name])) for name, p in loaded.named_parameters()} == dict.fromkeys(
        weights, True
    )


@rows
def test_the_engine_is_refused_with_advice(folder: Path, row: Row) -> None:
    said = left(folder, row)["refusals"]
    for operation in ("convert_model", "restore_model"):
        assert "is wrapped in DeepSpeedEngine: convert, restore or estimate the model before" in said[operation]
    assert said["classes"] == "unchanged"
