"""Small routed blocks, one of each kind, and blocks whose units are active in known groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from memsave import RoutedFFNConfig

WIDTH, UNITS, OUT = 6, 24, 5


class Gated(nn.Module):
    """Llama's, with biases and another width at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, UNITS)
        self.up_proj = nn.Linear(WIDTH, UNITS)
        self.down_proj = nn.Linear(UNITS, OUT)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Fused(nn.Module):
    """Phi-3's, the second half being the one that is activated."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * UNITS, bias=False)
        self.down_proj = nn.Linear(UNITS, OUT)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.act(gate))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, UNITS), nn.GELU(), nn.Linear(UNITS, OUT))


class Conv(nn.Module):
    """GPT-2's: weights are stored transposed, and a dropout follows."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.c_fc, self.c_proj = Conv1D(UNITS, WIDTH), Conv1D(OUT, UNITS)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


KINDS: dict[str, Callable[[], nn.Module]] = {"gated": Gated, "fused": Fused, "plain": plain, "conv1d": Conv}


def dense(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A plain block with random weights, biases too."""
    torch.manual_seed(0)
    module = KINDS[kind]()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.to(dtype)


def routed(module: nn.Module, calibration: Any = None, **settings: Any) -> Any:
    """The routed block in the place of `module`, whose router gives scores that differ."""
    model = nn.Sequential(module)
    config = RoutedFFNConfig(target_modules=["0"], **settings)
    memsave.convert_model(model, config, calibration=calibration)
    made: Any = model[0]
    if calibration is None:
        nn.init.normal_(made.router.weight)
        nn.init.normal_(made.router.bias, std=0.3)
    if config.lora_rank:
        for name in made.layout.names:
            nn.init.normal_(getattr(made, f"{name}_lora_b"), std=0.3)
    return made


def tokens(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, 14)), WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def upstream(y: Tensor) -> Tensor:
    """A fixed gradient of y, of both signs."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)


def gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of run(x), and the gradients of x and of all trained parameters."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.backward(upstream(y))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {
        name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Equal up to `tolerance` of each tensor's largest entry, or exactly zero where that is."""
    assert ours.keys() == expected.keys()
    for name, theirs in expected.items():
        error, largest = (ours[name].double() - theirs.double()).abs().max(), theirs.double().abs().max()
        assert error <= tolerance * largest, (name, float(error), float(largest))


class Planted(nn.Module):
    """A block of `groups` groups of units, scattered over it; each token activates the units of one group.

    Token kinds are directions of the input: the units of group g fire for x along the g-th direction only.
    """

    def __init__(self, groups: int = 4, size: int = 16, width: int = 32, *, gated: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.kinds = torch.linalg.qr(torch.randn(width, groups, generator=generator)).Q.t()  # (groups, D)
        self.group = torch.arange(groups).repeat_interleave(size)[torch.randperm(groups * size, generator=generator)]
        strength = 1 + torch.rand(groups * size, 1, generator=generator)
        self.up = nn.Linear(width, groups * size)
        self.gate = nn.Linear(width, groups * size) if gated else None
        self.down = nn.Linear(groups * size, width)
        self.act = nn.ReLU()
        with torch.no_grad():
            for linear in filter(None, (self.up, self.gate)):
                linear.weight.copy_(4 * strength * self.kinds[self.group])
                linear.bias.fill_(-1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))

    def inputs(self, count: int, seed: int = 1) -> Tensor:
        """(count, D) tokens of random kinds, with noise."""
        generator = torch.Generator().manual_seed(seed)
        kind = torch.randint(len(self.kinds), (count,), generator=generator)
        return self.kinds[kind] + 0.1 * torch.randn(count, self.kinds.shape[1], generator=generator)
