"""Models with SHiRA adapters, and what the tests of SHiRA ask of them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from memsave.integrations.peft.shira import SHiRALinear
from memsave.peft import SHiRAConfig

WIDTH, OUT, ROWS = 12, 8, 24
Run = Callable[[nn.Module, Tensor], Tensor]


def conv1d(inputs: int = WIDTH, outputs: int = OUT) -> Conv1D:
    """A `Conv1D` whose bias is not zero."""
    layer = Conv1D(outputs, inputs)
    nn.init.normal_(layer.bias)
    nn.init.normal_(layer.weight)
    return layer


LINEARS: dict[str, Callable[[], Any]] = {
    "linear": partial(nn.Linear, WIDTH, OUT),
    "linear without bias": partial(nn.Linear, WIDTH, OUT, bias=False),
    "conv1d": conv1d,
}


class Toy(nn.Module):
    """Three linears that read one tensor, and one that reads what they give."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        return self.out(self.q(x).tanh() * self.k(x) + self.v(x))


def config(**settings: Any) -> SHiRAConfig:
    return SHiRAConfig(**{"density": 0.25, "target_modules": r"(.*\.)?(q|k|v|out|lin|0)", **settings})


def randomize(model: nn.Module, name: str = "default", scale: float = 0.5, seed: int = 3) -> None:
    """Give the values of an adapter other values, the same ones in every run."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        if name in layer.memsave_shira_values:
            values = layer.memsave_shira_values[name]
            with torch.no_grad():
                values.copy_(torch.randn(values.shape, generator=generator, dtype=torch.float64) * scale)
            layer.held.sync()


def one(linear: nn.Module, *, trained: bool = True, **settings: Any) -> tuple[Any, SHiRALinear]:
    """A PEFT model around one linear, and its layer."""
    torch.manual_seed(1)
    model = peft.get_peft_model(nn.Sequential(OrderedDict(lin=linear)), config(**settings)).train()
    if trained:
        randomize(model)
    (layer,) = layers(model)
    return model, layer


def adapted(model: nn.Module, *, trained: bool = True, **settings: Any) -> Any:
    """A PEFT model around a copy of `model`, with values that are not zero if `trained`."""
    model = peft.get_peft_model(copy.deepcopy(model), config(**settings)).train()
    if trained:
        randomize(model)
    return model


def layers(model: nn.Module) -> list[SHiRALinear]:
    return [m for m in model.modules() if isinstance(m, SHiRALinear)]


def values(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    return [layer.memsave_shira_values[name] for layer in layers(model) if name in layer.memsave_shira_values]


def indices(layer: SHiRALinear, name: str = "default") -> Tensor:
    return layer.memsave_shira_indices[name].long()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, as a plain model names them; adapters' own are left out."""
    return {
        n.replace("base_layer.", "").replace("base_model.model.", ""): p.detach().clone()
        for n, p in model.named_parameters()
        if "memsave_shira" not in n
    }


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and bits."""
    return actual.keys() == expected.keys() and all(torch.equal(actual[n], expected[n]) for n in expected)


def upstream(y: Tensor) -> Tensor:
    return torch.linspace(-1, 2, y.numel(), dtype=torch.float64).to(y.dtype).view_as(y)


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of the input and of all the values, for a fixed upstream gradient."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    y = run(x)
    y.backward(upstream(y))
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def tokens(seed: int = 1, count: int = 12) -> dict[str, Tensor]:
    ids = torch.randint(0, 48, (2, count), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def llama(**settings: Any) -> Any:
    """A tiny Llama with the same random weights each time."""
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 32, "use_cache": False}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings}))


def compiled(m: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(m, backend="aot_eager", fullgraph=True)


RUNS: dict[str, Run] = {
    "eager": lambda m, x: m(x),
    "reentrant": lambda m, x: checkpoint(m, x, use_reentrant=True),
    "non-reentrant": lambda m, x: checkpoint(m, x, use_reentrant=False),
    "aot_eager": lambda m, x: compiled(m)(x),
}


def files(directory: Path) -> set[str]:
    return {path.suffix for path in directory.rglob("*") if path.is_file()}
