"""The benchmark case of linear + cross entropy: forward and backward of the loss, beside the ones that make all logits.

hidden (N, D), weight (V, D), target (N,); inputs have fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import memsave
from tests.harness import assert_within_budget

from .op_case import Contender, Inputs, OpCase

CHECKED_TOKENS = 1024
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossCase(OpCase):
    """Losses with their backward, side by side."""

    kind: ClassVar[str] = "loss"


def of_tokens(device: str, N: int, V: int, D: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) / D**0.5
    target = torch.randint(V, (N,), generator=generator)
    return {
        "hidden": hidden.to(device, dtype),
        "weight": weight.to(device, dtype),
        "target": target.to(device),
    }


def with_backward(loss: Loss) -> Callable[..., tuple[Tensor, ...]]:
    """Calls `loss` and its backward: the loss and the gradients of hidden and weight."""

    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torch.enable_grad():
            result = loss(*leaves, target)
        return result.detach(), *torch.autograd.grad(result, leaves)

    return step


def all_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def in_chunks_by_torch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def per_token(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return memsave.linear_cross_entropy(hidden, weight, target, reduction="none").mean()


def check(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Both of memsave's forms against float64, beside plain PyTorch, on the first tokens."""
    inputs = (hidden[:CHECKED_TOKENS], weight, target[:CHECKED_TOKENS])
    plain = with_backward(all_logits)(*inputs)
    exact = with_backward(all_logits)(inputs[0].double(), weight.double(), inputs[2])
    for loss in (memsave.linear_cross_entropy, per_token):
        for name, *results in zip(("loss", "dX", "dW"), with_backward(loss)(*inputs), exact, plain, strict=True):
            assert_within_budget(*results, where=name)


def _sizes(*rows: tuple[int, int, int, torch.dtype]) -> tuple[dict[str, Any], ...]:
    return tuple(dict(zip(("N", "V", "D", "dtype"), row, strict=True)) for row in rows)


LOSS_CASES = (
    LossCase(
        name="linear_cross_entropy",
        title="loss and gradients of a linear layer with cross entropy, forward and backward",
        devices=("cpu", "cuda"),
        inputs=of_tokens,
        contenders=(
            Contender(name="all logits", call=with_backward(all_logits)),
            Contender(name="memsave", call=with_backward(memsave.linear_cross_entropy)),
            Contender(name="memsave, loss per token", call=with_backward(per_token)),
            # In torch 2.13 and newer.
            Contender(name="torch's own, in chunks", call=with_backward(in_chunks_by_torch), may_fail=True),
        ),
        check=check,
        sizes={
            "cpu": _sizes(
                (4096, 32000, 512, torch.float32),
                (512, 50257, 768, torch.float32),
                (8192, 8000, 256, torch.float32),
                (64, 128256, 256, torch.float32),
            ),
            "cuda": _sizes((16384, 128256, 2048, torch.bfloat16)),
        },
        expected_s=300.0,
        tiny={"sizes": {device: _sizes((64, 96, 32, torch.float32)) for device in ("cpu", "cuda")}},
    ),
)
