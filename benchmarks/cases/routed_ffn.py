"""The benchmark cases of `RoutedFFNConfig`: one feed-forward block, dense and routed, forward and backward.

N tokens of d features, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from .case import Case

BLOCKS = 4


@dataclass(frozen=True, kw_only=True)
class RoutedWay:
    """One way to run the block.

    Attributes:
        active: how many of `BLOCKS` blocks each token uses; None for the dense block.
        checkpointed: whether backward runs the block again, by torch's activation checkpointing.
    """

    name: str
    active: int | None = None
    checkpointed: bool = False


ROUTED_WAYS = (
    RoutedWay(name="dense"),
    RoutedWay(name="dense, checkpointed", checkpointed=True),
    *(RoutedWay(name=f"memsave, {active} of {BLOCKS}", active=active) for active in (1, 2, 4)),
)


@dataclass(frozen=True, kw_only=True)
class RoutedFFNCase(Case):
    """Forward and backward of one block in fp32, for a random input that requires a gradient and a random gradient.

    Attributes:
        model: makes the dense block; called after seeding, so always the same.
        tokens: N.
        width: d.
        hidden: F.
        checked_tokens: how many tokens the check runs, in fp64 too.
        most_rounds: turns of each way are at most so many.
    """

    kind: ClassVar[str] = "routed_ffn"

    model: Callable[[int, int], nn.Module]
    tokens: int
    width: int
    hidden: int
    ways: tuple[RoutedWay, ...] = ROUTED_WAYS
    checked_tokens: int = 64
    most_rounds: int = 9
    method: str | None = "routed_ffn"
    devices: tuple[str, ...] = ("cpu", "cuda")
    expected_s: float = 60.0
    tiny: Mapping[str, Any] = field(default_factory=lambda: {"tokens": 64, "width": 16, "hidden": 64})

    def describe(self) -> dict[str, Any]:
        sizes = {"tokens": self.tokens, "width": self.width, "hidden": self.hidden}
        return super().describe() | sizes | {"dtype": "float32"}


class Gated(nn.Module):
    """Llama's block."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def plain(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


_of = partial(RoutedFFNCase, model=plain)
ROUTED_FFN_CASES = (
    _of(
        name="routed_ffn_1024",
        title="a feed-forward block with GELU, d = 1024, F = 4096, 2048 tokens, forward and backward, fp32",
        tokens=2048,
        width=1024,
        hidden=4096,
    ),
    _of(
        name="routed_ffn_gated_1024",
        title="a gated feed-forward block, d = 1024, F = 4096, 2048 tokens, forward and backward, fp32",
        model=Gated,
        tokens=2048,
        width=1024,
        hidden=4096,
    ),
    _of(
        name="routed_ffn_gated_4096",
        title="a gated feed-forward block (Llama-2-7B's), d = 4096, F = 11008, 512 tokens, forward and backward, fp32",
        model=Gated,
        tokens=512,
        width=4096,
        hidden=11008,
        checked_tokens=32,
        most_rounds=5,
        expected_s=180,
    ),
)
