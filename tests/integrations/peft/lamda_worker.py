"""One process of LaMDA's distributed tests: python -m tests.integrations.peft.lamda_worker RANK FOLDER."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memsave.integrations.peft.lamda import LaMDAFreezer, lamda_param_groups

from .lamda_models import adapted, batch, layers, llama

RANKS, STEPS, TOTAL_STEPS = 2, 8, 20
MODES = ("one process", "ddp", "fsdp2")


def train(mode: str) -> dict[str, Any]:
    """Losses, frozen rows and the adapter's values after 8 steps, past the end of the schedule, on one batch."""
    model = adapted(llama(), r=8, target_modules="all-linear")
    wrapped: nn.Module = model
    if mode == "ddp":
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if mode == "fsdp2":
        mesh = init_device_mesh("cpu", (RANKS,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(lamda_param_groups(model, weight_decay=0.1), lr=0.01)
    freezer = LaMDAFreezer(model, TOTAL_STEPS)
    losses, frozen, states = [], [], []
    for _ in range(STEPS):
        loss = wrapped(**batch()).loss
        loss.backward()
        optimizer.step()
        freezer.step(optimizer)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        frozen.append(layers(model)[0].frozen_rows("default"))
        states.append(len(optimizer.state))
    trained = {name: p.detach() for name, p in model.named_parameters() if "memsave_lamda" in name}
    values = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in trained.items()}
    return {"losses": losses, "frozen": frozen, "states": states, "values": values}


def main(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    torch.save({mode: train(mode) for mode in MODES[1:]}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
