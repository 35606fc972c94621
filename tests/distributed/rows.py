"""What the distributed tests train: every row of the case table within small residual layers, and a tiny Llama.

x is (..., D) with D = `WIDTH`, another one for every step and rank. All in fp64, so that sums in another order differ
by rounding alone; some norms compute in fp32 by themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from memsave import (
    LinearCrossEntropyConfig,
    MethodConfig,
    RecomputeDropoutConfig,
    RecomputeMLPConfig,
    RoutedFFNConfig,
    SparseMHAConfig,
    WTACRSConfig,
)

from ..cases.methods import CASES, NOTED_CASES, SHAPE, WIDTH, MethodCase, NotedCase
from ..test_methods import Fan
from ..toys import ToyLowRankConfig

RANKS, STEPS, LAYERS = 2, 3, 2


class Layer(nn.Module):
    """x + back(inner(x)), with what a row of the table makes as `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.back = nn.Linear(inner(torch.zeros(1, WIDTH)).shape[-1], WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(self.inner(x))


class Stack(nn.Module):
    """Layers one after the other; the output is the loss."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(make()) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


@dataclass(frozen=True)
class Row:
    """One model that two processes train.

    Attributes:
        id: names the row in the tests.
        make: builds the plain model; its output for a batch is the loss.
        convert: converts it in place.
        batch: the input of one rank at one step.
        exact: whether all gradients are those of the plain model; None where its parameters are others.
        random: whether the plain model draws, too: then no joined batch does what the ranks do.
        exact_in: the mode in which nothing is sampled, and all gradients are exact all the same.
        tolerance: relative error that rounding may cause in losses and weights.
    """

    id: str
    make: Callable[[], nn.Module]
    convert: Callable[[Any], object]
    batch: Callable[[int, int], Tensor]
    exact: bool | None
    tolerance: float = 1e-9
    random: bool = False
    exact_in: str | None = None

    def plain(self) -> nn.Module:
        """The plain model, with the same random weights at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make().double()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3)
        return model

    def converted(self) -> nn.Module:
        """The same model, converted."""
        model = self.plain()
        self.convert(model)
        return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-4)


def seed_draws(step: int, rank: int) -> None:
    """What a rank draws in a step is the same wherever that step is run."""
    torch.manual_seed(100 * step + rank)


def _stack(case: MethodCase | NotedCase) -> Row:
    noted = isinstance(case, NotedCase)
    shape = SHAPE if noted else case.shape

    def batch(step: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * step + rank)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sampled = any(isinstance(config, WTACRSConfig) for config in case.configs) if noted else case.gradients == "sampled"
    return Row(
        "+".join(config.name for config in case.configs) + ("-noted-" if noted else "-") + case.name,
        lambda: Stack(lambda: Fan(case) if isinstance(case, NotedCase) else case.make()),
        lambda model: [_convert(layer.inner, case.configs) for layer in model.layers],
        batch,
        exact=not sampled,
        tolerance=1e-9 if case.precision is torch.float64 else 1e-4,
        random=any(isinstance(config, RecomputeDropoutConfig) for config in case.configs),
        # There a block's linears are sharded while it runs forward, so it cannot be run again by itself.
        exact_in="fsdp_linear" if any(isinstance(config, RecomputeMLPConfig) for config in case.configs) else None,
    )


def _convert(inner: nn.Module, configs: tuple[MethodConfig, ...]) -> None:
    """Convert `inner` alone, as the child of a container: the row's targets match every name."""
    memsave.convert_model(nn.Sequential(inner), configs)


class LlamaLoss(nn.Module):
    """A tiny Llama whose output is the loss."""

    def __init__(self, num_classes: int = 32) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"vocab_size": num_classes, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads))

    @property
    def layers(self) -> Any:
        return self.llama.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(input_ids=tokens, labels=tokens).loss


def _tokens(step: int, rank: int) -> Tensor:
    return torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(10 * step + rank))


def _many_tokens(step: int, rank: int) -> Tensor:
    """Enough of them, and of 128 classes, for lazy logits."""
    return torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(10 * step + rank))


def _feed_forward() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


def _route(model: Any, **settings: Any) -> None:
    """The routers are drawn, and the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        memsave.convert_model(model, RoutedFFNConfig(balance_loss=0.1, **settings))


def _attend_to_few(model: Any) -> None:
    """To eight of 32 keys; the codebooks are fitted to the batches, and stay."""
    config = SparseMHAConfig(
        keep=8, granularity="token", num_subspaces=2, num_codewords=4, dense_below=0, target_modules=r".*self_attn"
    )
    memsave.convert_model(model, config, calibration=[_many_tokens(0, rank) for rank in range(RANKS)])


_LAZY = LinearCrossEntropyConfig(min_logits_bytes=0)
_MLP = WTACRSConfig(keep_ratio=0.3, min_rows=1, target_modules=["gate_proj", "up_proj", "down_proj"])
_LOW_RANK = ToyLowRankConfig(rank=3, target_modules=["inner"])
ROWS = [_stack(case) for case in [*CASES, *NOTED_CASES]] + [
    replace(_stack(CASES[-1]), id="toy_low_rank", convert=lambda m: memsave.convert_model(m, _LOW_RANK), exact=None),
    replace(
        _stack(CASES[-1]),
        id="routed_ffn",
        make=lambda: Stack(_feed_forward),
        convert=lambda m: _route(m, target_modules=["inner"]),
        batch=lambda step, rank: torch.randn(
            40, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64
        ),
        exact=None,
    ),
    Row(
        "routed_ffn-lora",
        LlamaLoss,
        lambda m: (_route(m, lora_rank=2, target_modules=r".*mlp"), memsave.convert_model(m)),
        _tokens,
        exact=None,
        tolerance=1e-4,
    ),
    Row("sparse_mha", lambda: LlamaLoss(128), _attend_to_few, _many_tokens, exact=None, tolerance=1e-4),
    # Its norms and its loss are computed in fp32.
    Row("llama-bare", LlamaLoss, memsave.convert_model, _tokens, exact=True, tolerance=1e-4),
    Row(
        "lazy_logits",
        lambda: LlamaLoss(128),
        lambda m: memsave.convert_model(m, _LAZY),
        _many_tokens,
        exact=True,
        tolerance=1e-4,
    ),
    Row("llama-wta_crs", LlamaLoss, lambda m: memsave.convert_model(m, _MLP), _tokens, exact=False, tolerance=1e-4),
    Row(
        "llama-bare+wta_crs",
        LlamaLoss,
        lambda m: (memsave.convert_model(m), memsave.convert_model(m, _MLP)),
        _tokens,
        exact=False,
        tolerance=1e-4,
    ),
]
