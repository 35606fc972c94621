"""What the tests of remembered gradient norms share: models, data with given norms, and a look into the memory.

x (B, T, D), dy (B, T, O): B samples of T tokens. A plain `y.backward(dy)` sets what a layer's gradient norms are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import memsave
from memsave.nn import grad_norms
from memsave.nn.grad_norms import GradNormCache, decode, encode

from .linears import OUT, D

B, T = 4, 16
KEEP_RATIO = 0.3
IDS = [5, 2, 7, 0]


def cached(model: nn.Module, **settings: Any) -> Any:
    """A copy of `model` whose linears sample rows by remembered norms."""
    model = copy.deepcopy(model)
    defaults = {"keep_ratio": KEEP_RATIO, "min_rows": 1, "grad_norms": "sample_cache", "target_modules": r".*"}
    memsave.convert_model(model, memsave.WTACRSConfig(**(defaults | settings)))
    return model


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, OUT))


def data(samples: int = B, tokens: int = T, seed: int = 0, spread: float = 1.5) -> tuple[Tensor, Tensor]:
    """x with rows of similar norm, as behind a norm layer, and dy with log-normal ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, D, generator=generator)
    dy = torch.randn(samples, tokens, OUT, generator=generator)
    return x, dy * (spread * torch.randn(samples, tokens, 1, generator=generator)).exp()


def visit(model: nn.Module, ids: Sequence[int], x: Tensor, dy: Tensor) -> None:
    """One training step on a batch, without an optimizer."""
    with memsave.sample_ids(ids):
        model(x).backward(dy)


def factors(model: nn.Module, ids: Sequence[int], tokens: int = T) -> Tensor:
    """(B, T): the factors of the tokens' weights now, by the only memory that `model` has."""
    grad_norms.remember()
    (cache,) = (c for c in caches(model) if c.codes.numel())
    found = cache.factors(torch.tensor(ids), tokens, torch.device("cpu"))
    assert found is not None
    return found


def caches(model: nn.Module) -> list[GradNormCache]:
    found = (module.__dict__.get("_memsave_grad_norms") for module in model.modules())
    return [cache for cache in found if cache is not None]


def rounded(norms: Tensor) -> Tensor:
    """What the factors are after a visit with these norms."""
    return decode(encode(norms.flatten())).view_as(norms)
