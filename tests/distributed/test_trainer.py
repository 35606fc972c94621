"""MemsaveCallback in a Trainer under DDP, on two gloo processes: converted before the wrapping, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memsave

pytest.importorskip("accelerate", reason="transformers' Trainer needs it (pip install 'memsave[hf]')")
pytest.importorskip("peft", reason="needs peft (pip install 'memsave[hf]')")

from ..integrations.peft.processes import needs_gloo  # noqa: E402
from ..integrations.test_trainer_resume import CASES, STEPS, differing, run  # noqa: E402
from ..integrations.trainers import logged  # noqa: E402
from .test_rows import run_processes  # noqa: E402
from .trainer_worker import NAMES, RANKS  # noqa: E402

pytestmark = [needs_gloo, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("trainer")
    run_processes("tests.distributed.trainer_worker", [], RANKS, folder)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log.*")))
    assert all((folder / f"{rank}.pt").exists() for rank in range(RANKS)), logs
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_resume_to_the_same_bits(name: str, left: Any) -> None:
    for rank, found in enumerate(each[name] for each in left[1]):
        assert found["wrapper"] == "DistributedDataParallel" and len(found["losses"][0]) == STEPS
        assert found["losses"][0] == found["losses"][1]
        assert differing(*found["weights"]) == []
        assert len(found["measured"]) == (1 if rank == 0 else 0)
    assert differing(left[1][0][name]["weights"][0], left[1][1][name]["weights"][0]) == []


def test_two_processes_train_as_one_with_both_batches(left: Any, tmp_path: Path) -> None:
    one = run(tmp_path, CASES["exact_no_dropout"], per_device_train_batch_size=2)
    one.train()
    assert left[1][0]["exact_no_dropout"]["losses"][0] == pytest.approx(logged(one), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].keys])
def test_memsave_loads_the_checkpoint(name: str, left: Any) -> None:
    loaded = memsave.load(max((left[0] / name).glob("checkpoint-*")))
    expected = left[1][0][name]["weights"][0]
    assert {key for key, value in loaded.state_dict().items() if value.shape != expected[key].shape} == set()
