"""The attention function that transformers models call after `ShareMaskConfig` converted them.

It is registered under a name of its own, by transformers' public registries, and a model asks for it by its config.
Configs never write that name: `config.json` is what the plain model would write. Masks are made by transformers' own
function for SDPA.

query is (B, h, T, D), key and value (B, kv, S, D), attention_mask (B, 1, T, S).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import create_position_bias_mask, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..nn.attention import SharedMask, additive_mask, cpu_attention, dtype_of_attention, shared_mask
from ..nn.eager import autocast_enabled, plain

NAME = "memsave_sdpa"
_PLAIN = "sdpa"
SPARSE, SPARSE_SHARED = "memsave_sparse", "memsave_sparse_shared"
"""What models with sparse attention ask for (`sparse_attention.py`): without, and with, masks that layers share."""
_SHARING = {_PLAIN: NAME, SPARSE: SPARSE_SHARED}
_KNOWN = {
    "module",
    "query",
    "key",
    "value",
    "attention_mask",
    "dropout",
    "scaling",
    "is_causal",
    "position_bias",
    "kwargs",
}
_OTHERS = (set(inspect.signature(sdpa_attention_forward).parameters) - _KNOWN) | {"softcap", "output_attentions"}
"""Arguments, such as a paged cache, that transformers' own function must see to."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' `sdpa_attention_forward` returns, (B, T, h, D), keeping less for backward."""
    special = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _OTHERS)
    settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
    if plain(query) or special or not torch.is_grad_enabled():
        return _stock(module, query, key, value, attention_mask, **settings)
    causal = query.shape[2] > 1 and attention_mask is None and _is_causal(module, is_causal)
    if causal and key.shape[2] > query.shape[2]:  # an empty static cache
        return _stock(module, query, key, value, attention_mask, **settings)
    shared = _shared_mask(query, key, attention_mask, causal, kwargs.get("position_bias"))
    mask = attention_mask
    if shared is not None:
        mask, causal = shared.mask, False
        settings |= {"position_bias": None, "is_causal": False}
    if query.device.type == "cpu" and _groups(module) == query.shape[1] // key.shape[1]:
        y = cpu_attention(query, key, value, mask, dropout=dropout, scale=scaling, is_causal=causal)
        y = y.transpose(1, 2).contiguous()  # (B, T, h, D)
    else:
        y, _ = _stock(module, query, key, value, mask, **settings)
    if shared is not None:
        shared.hold_with(y)
    return y, None


def _stock(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    output: tuple[Tensor, None] = sdpa_attention_forward(*args, **kwargs)
    return output


def _shared_mask(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, position_bias: Tensor | None
) -> SharedMask | None:
    """The mask to add to the scores, as all layers that were given the same tensors read it; None if none is made."""
    dtype = dtype_of_attention(query)
    if position_bias is None:
        if mask is None or mask.dtype != torch.bool:
            return None
        return shared_mask(mask, (dtype,), partial(additive_mask, mask, dtype))

    def combined() -> Tensor:
        made: Tensor = create_position_bias_mask(position_bias, mask, causal, query, key)
        return made.to(dtype) if autocast_enabled(query) else made

    return shared_mask(position_bias, (dtype, causal, query.shape[2], key.shape[2]), combined, beside=mask)


def _is_causal(module: nn.Module, asked: bool | None) -> bool:
    return getattr(module, "is_causal", True) if asked is None else asked


def _groups(module: nn.Module) -> int:
    """How many heads of the query read one head of the keys, as the module has it."""
    return getattr(module, "num_key_value_groups", 1)


def register() -> None:
    """Make the attention function known to transformers; any number of times."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use(model: nn.Module) -> None:
    """Let every transformers model in `model` that uses SDPA use the registered function instead."""
    register()
    for config in _configs(model):
        _set(config, _SHARING.get(config._attn_implementation, config._attn_implementation))


def use_no_more(model: nn.Module) -> None:
    """Undo `use`."""
    back = {sharing: plain for plain, sharing in _SHARING.items()}
    for config in _configs(model):
        _set(config, back.get(config._attn_implementation, config._attn_implementation))


def takes_attention(model: nn.Module) -> bool:
    """Whether a transformers model in `model` could use SDPA."""
    return any(module._supports_sdpa for module in _models(model))


def why_not(model: nn.Module) -> str | None:
    """Say why no transformers model in `model` can use the registered function, or return None."""
    reasons = [_why_not_this(module) for module in _models(model) if module._supports_sdpa]
    return None if None in reasons else reasons[0]


def _why_not_this(model: PreTrainedModel) -> str | None:
    implementation = model.config._attn_implementation
    if implementation not in (*_SHARING, *_SHARING.values()):
        return f"its attention is {implementation!r}; only {_PLAIN!r} (set_attn_implementation) can share masks"
    if not _asks_the_registry(type(model)):
        return f"the code of {type(model).__name__} chooses its attention without transformers' registry"
    return None


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    return (module for module in model.modules() if isinstance(module, PreTrainedModel))


def _configs(model: nn.Module) -> list[Any]:
    """The configs of the models that can use the registered function, each once."""
    return list({id(m.config): m.config for m in _models(model) if _why_not_this(m) is None}.values())


def _set(config: Any, name: str) -> None:
    # As `set_attn_implementation` does, but for this config alone: that function hands a name on to the configs
    # of all models inside, also of those that use another one.
    config._attn_implementation_internal = name


def _asks_the_registry(cls: type[PreTrainedModel]) -> bool:
    """Whether the classes beside `cls` find their attention by name and none of them asks for "sdpa" itself."""
    source = inspect.getsource(sys.modules[cls.__module__])
    return cls._can_set_attn_implementation() and not asks_for_sdpa(source)


def asks_for_sdpa(source: str) -> bool:
    """Whether code asks for "sdpa" itself: where the name is another, it would make, say, another kind of mask."""
    return re.search(r"_attn_implementation\s*(==|!=|in|not in)\s*[^\n]*[\"']sdpa[\"']", source) is not None
