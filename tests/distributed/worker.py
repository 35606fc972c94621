"""One of the two processes of a distributed test: python -m tests.distributed.worker MODE RANK FOLDER.

It trains every row, wrapped by MODE, and rank 0 leaves one file per row in FOLDER for the tests to read. A row that
raises ends the process: after it, the ranks may wait for each other in different places.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import memsave
from memsave.nn.linear import is_linear

from .rows import RANKS, ROWS, STEPS, Row, optimizer_of, seed_draws

HANG = timedelta(seconds=60)


def ddp(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp_layer(model: Any) -> nn.Module:
    """One unit per decoder layer."""
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def fsdp_linear(model: Any) -> nn.Module:
    """One unit per linear."""
    for module in list(model.modules()):
        if is_linear(module):
            fully_shard(module)
    return fully_shard(model)


MODES: dict[str, Callable[[Any], nn.Module]] = {"ddp": ddp, "fsdp_layer": fsdp_layer, "fsdp_linear": fsdp_linear}


def train(model: nn.Module, row: Row, rank: int) -> list[float]:
    """The losses of the steps, averaged over the ranks."""
    optimizer, losses = optimizer_of(model), []
    for step in range(STEPS):
        seed_draws(step, rank)
        loss = model(row.batch(step, rank))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / RANKS)
    return losses


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, dist.tensor.DTensor) else tensor


def refusals(model: nn.Module) -> dict[str, str]:
    """What the operations that need an unwrapped model say of a wrapped one, and whether its classes changed."""
    classes = [type(m) for m in model.modules()]
    said = {
        "convert_model": refusal(lambda: memsave.convert_model(model)),
        "restore_model": refusal(lambda: memsave.restore_model(model)),
    }
    said["classes"] = "changed" if classes != [type(m) for m in model.modules()] else "unchanged"
    return said


def refusal(operation: Callable[[], object]) -> str:
    try:
        return f"returned {operation()}"
    except memsave.MemsaveError as error:
        return str(error)


def run(row: Row, mode: str, rank: int, folder: Path) -> dict[str, Any]:
    """Train, gather and save one row; what the tests compare."""
    model = MODES[mode](row.converted())
    losses = train(model, row, rank)
    inner = model.module if mode == "ddp" else model
    # Two ways to the trained weights: the state dict that a user would save, and each parameter gathered by itself.
    gathered = get_model_state_dict(inner, options=StateDictOptions(full_state_dict=True))
    weights = {name: whole(p.detach()).clone() for name, p in inner.named_parameters()}
    same = [torch.empty_like(w) for w in weights.values()]
    for mine, first in zip(weights.values(), same, strict=True):
        first.copy_(mine)
        dist.broadcast(first, src=0)
    differs = torch.tensor([any(not torch.equal(a, b) for a, b in zip(weights.values(), same, strict=True))]).int()
    dist.all_reduce(differs)
    if rank == 0:
        memsave.save(inner, folder / f"{row.id}.memsave", state_dict=gathered)
    dcp.save({"model": get_model_state_dict(inner)}, checkpoint_id=folder / f"{row.id}.dcp")
    return {
        "losses": losses,
        "gathered": gathered,
        "weights": weights,
        "ranks differ": bool(differs),
        "refusals": refusals(model),
        "sharded": refusal(lambda: memsave.save(inner, folder / "never")) if mode != "ddp" else "",
    }


def main(mode: str, rank: int, folder: Path) -> int:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=HANG)
    for row in ROWS:
        try:
            result = run(row, mode, rank, folder)
        except Exception:
            (folder / f"{row.id}.{rank}.error").write_text(traceback.format_exc())
            return 1
        if rank == 0:
            torch.save(result, folder / f"{row.id}.pt")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
