"""Running a worker of this folder in several gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.test_rows import run_processes

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this PyTorch is built without gloo"
)


def left_by(worker: str, ranks: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank of `python -m tests.integrations.peft.<worker> RANK FOLDER` saved."""
    run_processes(f"tests.integrations.peft.{worker}", [], ranks, folder)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log.*")))
    found = [folder / f"{rank}.pt" for rank in range(ranks)]
    assert all(path.exists() for path in found), logs
    return [torch.load(path) for path in found]
