"""What the tests of sampled linears share: converting one layer, and the gradients of one step.

x (N, D), dy (N, O), weight (O, D) or, for Conv1D, (D, O); dW is always reported as (O, D).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import memsave

N, D, OUT = 64, 8, 6
Model = TypeVar("Model", bound=nn.Module)

ESTIMATORS = ("pps", "wta_crs", "crs")


def make_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, OUT))


def make_conv1d() -> nn.Sequential:
    return nn.Sequential(Conv1D(OUT, D))


def make_noted() -> nn.Sequential:
    """The linear reads a norm's output, which its note recomputes."""
    norm = nn.RMSNorm(D)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return nn.Sequential(norm, nn.Linear(D, OUT))


LAYERS: dict[str, Callable[[], nn.Sequential]] = {"Linear": make_linear, "Conv1D": make_conv1d, "noted": make_noted}


def convert(model: Model, keep_ratio: float = 0.3, estimator: str = "pps", min_rows: int = 1) -> Model:
    """A copy of `model` whose linears sample rows, and whose norms, where it has any, attach notes."""
    model = copy.deepcopy(model)
    if any(isinstance(module, (nn.RMSNorm, nn.LayerNorm)) for module in model.modules()):
        memsave.convert_model(model)
    config = memsave.WTACRSConfig(keep_ratio=keep_ratio, estimator=estimator, min_rows=min_rows, target_modules=r".*")
    memsave.convert_model(model, config)
    return model


def last_weight_grad(model: nn.Sequential, x: Tensor, dy: Tensor) -> Tensor:
    """dW (O, D) of the last layer for the upstream gradient dy."""
    layer: Any = model[-1]
    (grad,) = torch.autograd.grad(model(x), layer.weight, dy)
    return grad.t() if isinstance(layer, Conv1D) else grad


def grads(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """dx, and the gradient of every parameter that has one."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    model(x).backward(dy)
    assert x.grad is not None
    return x.grad, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_data(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x (N, D) with log-normal row norms, and dy (N, O) that depends on it, so that the exact dW is not mere noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator) * (0.5 * torch.randn(N, 1, generator=generator)).exp()
    dy = x @ torch.randn(D, OUT, generator=generator) + 0.5 * torch.randn(N, OUT, generator=generator)
    return x.to(dtype), dy.to(dtype)
