"""Which modules a LaMDA config means, and why some of them cannot be adapted: all found before anything is replaced."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ....nn.converted import original_class
from ....nn.linear import is_linear
from ..targets import refuse, targets_of
from .config import LaMDAConfig
from .fingerprint import DTYPES
from .layer import LaMDALinear


def checked_targets(model: nn.Module, config: LaMDAConfig) -> dict[str, nn.Module]:
    """{name: the linear itself} of what `config` targets in `model`, in order.

    Raises ValueError without target_modules, and UnsupportedModelError, all problems together, for modules that cannot
    be adapted. The model is not changed.
    """
    if config.target_modules is None:
        raise ValueError(
            "LaMDAConfig needs target_modules, such as ['q_proj', 'v_proj'] or 'all-linear': memsave has no table of "
            "what to adapt in which architecture. The model was not changed."
        )
    refuse(problems(config, model), "LaMDA")
    return {name: _linear(module) for name, module in targets_of(config, model)}


def problems(config: LaMDAConfig, model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of each target that cannot be adapted; changes nothing."""
    found = ((name, why_not(_linear(module), rank_of(name, config))) for name, module in targets_of(config, model))
    return [(name, reason) for name, reason in found if reason]


def _linear(module: Any) -> nn.Module:
    return module.get_base_layer() if isinstance(module, LaMDALinear) else module


def rank_of(name: str, config: LaMDAConfig) -> int:
    """The rank of the module `name`: that of its own name in rank_pattern, of a pattern (PEFT's rule), or r."""
    pattern = config.rank_pattern or {}
    if name in pattern:
        return pattern[name]
    return next((rank for key, rank in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), config.r)


def why_not(linear: nn.Module, rank: int) -> str | None:
    """Why LaMDA cannot adapt a module with this rank, in words, or None."""
    if isinstance(linear, BaseTunerLayer):
        return f"it is adapted by another method already ({type(linear).__name__}); unload that first"
    weight = getattr(linear, "weight", None)
    if isinstance(weight, Tensor) and not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is quantized ({weight.dtype}) and has no values to decompose; load the model unquantized"
    if linear._modules.get("parametrizations") is not None:
        return "it is parametrized (torch.nn.utils.parametrize); remove the parametrization first"
    if not is_linear(linear):
        return f"its class is {original_class(linear).__name__}, expected nn.Linear or transformers' Conv1D"
    assert isinstance(weight, Tensor)
    if weight.is_complex():
        return f"its weight is complex ({weight.dtype}), expected real values"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, expected float64, float32, bfloat16 or float16"
    if weight.is_meta:
        return "its weight is on the meta device and has no values to decompose; load the model before adapting it"
    if isinstance(weight, FakeTensor):  # of `memsave.estimate`: the sizes are all that counts
        return None if rank <= min(weight.shape) else _rank_too_large(rank, weight)
    if type(weight.data) is not Tensor:
        kind = type(weight.data).__name__
        return f"its weight is a {kind}, expected an ordinary tensor; adapt the model before quantizing or sharding it"
    if rank > min(weight.shape):
        return _rank_too_large(rank, weight)
    if not bool(torch.isfinite(weight.detach()).all()):
        return "its weight has infinite or NaN values, which have no singular vectors"
    return None


def _rank_too_large(rank: int, weight: Tensor) -> str:
    return f"its rank is {rank} (r, or rank_pattern), expected at most min(in, out) = {min(weight.shape)}"
