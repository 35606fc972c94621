"""One of two processes of transformers' Trainer under DDP: python -m tests.distributed.trainer_worker RANK FOLDER.

Each case of `NAMES` is trained without a stop, and again from the checkpoint in the middle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..integrations.test_trainer_resume import CASES, SAVED, run, state
from ..integrations.trainers import logged

RANKS = 2
NAMES = ("exact_no_dropout", "routed_ffn", "lamda")


def trained(name: str, folder: Path) -> dict[str, Any]:
    """What both runs logged, their weights, and what was measured of one."""
    case = CASES[name]
    settings = {"per_device_train_batch_size": 1, "ddp_find_unused_parameters": name == "lamda"}
    whole = run(folder / name, case, **settings)
    whole.train()
    resumed = run(folder / name, case, **settings)
    resumed.train(resume_from_checkpoint=str(folder / name / f"checkpoint-{SAVED}"))
    return {
        "wrapper": type(whole.model_wrapped).__name__,
        "losses": [logged(whole), logged(resumed)],
        "weights": [state(whole.model), state(resumed.model)],
        "measured": logged(whole, "memsave_kept_bytes"),
    }


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost")
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    torch.save({name: trained(name, folder) for name in NAMES}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
