"""Which modules a LaMDA config means, and why some of them cannot be adapted: all found before anything is replaced."""

from __future__ import annotations

import re

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import Tensor, nn

from ....errors import MemsaveError, UnsupportedModelError, raise_all
from ....nn.converted import original_class
from ....nn.linear import is_linear
from .config import LaMDAConfig
from .fingerprint import DTYPES
from .layer import LaMDALinear


def checked_targets(model: nn.Module, config: LaMDAConfig) -> dict[str, nn.Module]:
    """{name: the linear itself} of what `config` targets in `model`, in order; "all-linear" is spelled out there.

    Raises ValueError without target_modules, and memsave's errors (ValueErrors), all problems together, for modules
    that cannot be adapted. The model is not changed.
    """
    if config.target_modules is None:
        raise ValueError(
            "LaMDAConfig needs target_modules, such as ['q_proj', 'v_proj'] or 'all-linear': memsave has no table of "
            "what to adapt in which architecture. The model was not changed."
        )
    _maybe_include_all_linear_layers(config, model)
    found, problems, inside = {}, list[MemsaveError](), tuple[str, ...]()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        if not BaseTuner._check_target_module_exists(config, name):
            continue
        linear = module.get_base_layer() if isinstance(module, LaMDALinear) else module
        reason = why_not(linear, rank_of(name, config))
        if reason is None:
            found[name] = linear
        else:
            problems.append(UnsupportedModelError(f"LaMDA cannot adapt {name}: {reason}. The model was not changed."))
    raise_all(problems)
    return found


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
    if type(weight.data) is not Tensor:
        kind = type(weight.data).__name__
        return f"its weight is a {kind}, expected an ordinary tensor; adapt the model before quantizing or sharding it"
    if rank > (most := min(weight.shape)):
        return f"its rank is {rank} (r, or rank_pattern), expected at most min(in, out) = {most}"
    if not bool(torch.isfinite(weight.detach()).all()):
        return "its weight has infinite or NaN values, which have no singular vectors"
    return None
