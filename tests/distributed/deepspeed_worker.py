"""One of two processes under DeepSpeed's ZeRO-3: python -m tests.distributed.deepspeed_worker RANK FOLDER.

Every parameter is divided over the ranks and gathered for the module whose forward or backward runs. Rank 0 leaves one
file per row in FOLDER; a row that raises leaves its error and ends the process.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import memsave

from .rows import RANKS, ROWS, STEPS, Row, optimizer_of, seed_draws
from .worker import refusals

HANG = timedelta(seconds=120)
ZERO_ROWS = [
    row
    for row in ROWS
    if row.id in ("llama-bare", "llama-bare+wta_crs", "lazy_logits", "routed_ffn-lora", "sparse_mha")
]
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def single(row: Row) -> Any:
    """The converted model in fp32, which DeepSpeed trains in."""
    return row.converted().float()


def train(engine: Any, row: Row, rank: int) -> list[float]:
    """The losses of the steps, averaged over the ranks."""
    losses = []
    for step in range(STEPS):
        seed_draws(step, rank)
        loss = engine(row.batch(step, rank))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / RANKS)
    return losses


def run(row: Row, rank: int, folder: Path) -> dict[str, Any]:
    """Train, gather and save one row."""
    import deepspeed

    model: nn.Module = single(row)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=CONFIG)
    losses = train(engine, row, rank)
    sharded = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if rank == 0:
            memsave.save(model, folder / f"{row.id}.memsave")
    return {"losses": losses, "weights": weights, "sharded": sharded, "refusals": refusals(engine)}


def main(rank: int, folder: Path) -> int:
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=HANG)
    for row in ZERO_ROWS:
        try:
            result = run(row, rank, folder)
        except Exception:
            (folder / f"{row.id}.{rank}.error").write_text(traceback.format_exc())
            return 1
        if rank == 0:
            torch.save(result, folder / f"{row.id}.pt")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2])))
