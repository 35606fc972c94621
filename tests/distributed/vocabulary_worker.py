"""One process of the vocabulary-parallel tests: python -m tests.distributed.vocabulary_worker RANKS RANK FOLDER.

hidden (N, D) and target (N,) are the same everywhere; weight (V, D) and bias (V,) are divided by `SHARDS`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from memsave import linear_cross_entropy

HANG = timedelta(seconds=60)
N, V, D, CHUNK_TOKENS, IGNORE = 22, 23, 6, 5, -7
SHARDS = {1: (23,), 2: (9, 14), 4: (1, 10, 0, 12)}  # classes of each rank
OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none", "z_loss": 0.1},
    "all": {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.1},
    "all_per_token": {"label_smoothing": 0.2, "softcap": 2.0, "z_loss": 0.1, "reduction": "none"},
    "logsumexp": {"return_logsumexp": True, "softcap": 3.0},
    "large": {},
    "masked": {"reduction": "none"},
}


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias and target of a case, float64."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((N, D), (V, D), (V,))
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    target = torch.randint(V, (N,), generator=generator)
    target[::4] = IGNORE
    if name == "large":
        hidden *= 1e4
    if name == "masked":  # no finite logit on the first rank of several, and small ones elsewhere
        bias[: SHARDS[4][0]] = -torch.inf
        bias[SHARDS[4][0] :] -= 1e4
        target[target == 0] = 1
    return hidden, weight, bias, target


def run(name: str, ranks: int, rank: int, group: Any) -> list[Tensor]:
    """What the function returns, and the gradients of hidden and of this rank's weight and bias."""
    hidden, weight, bias, target = inputs(name)
    first = sum(SHARDS[ranks][:rank])
    here = slice(first, first + SHARDS[ranks][rank])
    leaves = [t.clone().requires_grad_() for t in (hidden, weight[here], bias[here])]
    results = linear_cross_entropy(
        *leaves[:2], target, leaves[2], ignore_index=IGNORE, process_group=group, **OPTIONS[name]
    )
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((r * torch.linspace(0.5, 1.5, r.numel()).view_as(r)).sum() for r in results)
    assert isinstance(loss, Tensor)
    loss.backward()
    return [*(r.detach() for r in results), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def refusal(ranks: int, rank: int) -> str:
    """What a target out of range says: one that is outside of most shards, but not of the vocabulary, is fine."""
    weight = torch.zeros(SHARDS[ranks][rank], D)
    linear_cross_entropy(torch.zeros(1, D), weight, torch.tensor([V - 1]), process_group=dist.group.WORLD)
    try:
        linear_cross_entropy(torch.zeros(1, D), weight, torch.tensor([V]), process_group=dist.group.WORLD)
    except IndexError as error:
        return str(error)
    return "none"


def main(ranks: int, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=HANG)
    module = import_module("memsave.nn.linear_cross_entropy")
    module.CHUNK_BYTES = CHUNK_TOKENS * max(SHARDS[ranks]) * 8  # type: ignore[attr-defined]
    module.MIN_TOKENS_PER_PASS = 0  # type: ignore[attr-defined]
    results, messages = {}, {}
    for name in OPTIONS:
        with CommDebugMode() as counter:
            results[name] = run(name, ranks, rank, dist.group.WORLD)
        messages[name] = counter.get_total_counts()
    torch.save({"results": results, "messages": messages, "refusal": refusal(ranks, rank)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
