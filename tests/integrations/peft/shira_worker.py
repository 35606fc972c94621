"""One process of SHiRA's distributed tests: python -m tests.integrations.peft.shira_worker RANK FOLDER.

Every rank trains on its own sequence; one process that trains on all of them must get the same.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from memsave.peft import SHiRAConfig

from .lamda_models import llama
from .shira import layers, randomize

RANKS, STEPS = 2, 3
MODES = ("one process", "ddp", "fsdp2", "fsdp2 of a trained adapter", "fsdp2 of one not written yet")


def tokens(rank: int | None) -> Tensor:
    """The sequence of one rank, or all of them."""
    every = torch.arange(32).view(RANKS, 16) % 31
    return every if rank is None else every[rank : rank + 1]


def trained_before(mode: str) -> bool:
    return mode.startswith("fsdp2 of")


def train(mode: str, rank: int | None = None, *, start: bool = False) -> dict[str, Any]:
    """Losses, values and outputs of three steps; `start`: from values that are not zero."""
    ids = tokens(rank)
    model: Any = peft.get_peft_model(llama(), SHiRAConfig(density=0.05, target_modules="all-linear"))
    if start:
        randomize(model, scale=0.05)
    if mode == "fsdp2 of one not written yet":  # the weights hold other values than the ones that are there
        for layer in layers(model):
            layer.held.put_back()
    wrapped: nn.Module = DistributedDataParallel(model) if mode == "ddp" else model
    if mode.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (RANKS,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with model.disable_adapter(), torch.no_grad():
        without = model(input_ids=tokens(None)).logits
    saved = {name: whole(value) for name, value in get_peft_model_state_dict(model).items()}
    return {
        "loss": mean_over_ranks(torch.stack(losses), rank),
        "without": without,
        "values": {name: value for name, value in saved.items() if name.endswith("values")},
        "sharded": {layer.held.sharded for layer in layers(model)},
        "weight": whole(layers(model)[0].base_layer.weight.detach()),
    }


def mean_over_ranks(loss: Tensor, rank: int | None) -> Tensor:
    if rank is not None:
        dist.all_reduce(loss)
        loss /= RANKS
    return loss


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def main(rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    found = {mode: train(mode, rank, start=trained_before(mode)) for mode in MODES[1:]}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
