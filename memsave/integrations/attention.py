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
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..nn.attention import cpu_attention, dtype_of_attention, shared_mask
from ..nn.eager import plain

NAME = "memsave_sdpa"
_STOCK = "sdpa"
_KNOWN = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_OTHERS = (set(inspect.signature(sdpa_attention_forward).parameters) - _KNOWN) | {"softcap", "output_attentions"}
"""Arguments, such as a paged cache or a bias of positions, that transformers' own function must see to."""


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
    mask = attention_mask
    causal = query.shape[2] > 1 and mask is None and _is_causal(module, is_causal)
    special = any(kwargs.get(name) is not None and kwargs[name] is not False for name in _OTHERS)
    longer = causal and key.shape[2] > query.shape[2]  # an empty static cache
    if special or longer or plain(query) or not torch.is_grad_enabled():
        stock = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **stock)
        return output
    shared = shared_mask(mask, dtype_of_attention(query)) if mask is not None and mask.dtype == torch.bool else None
    if shared is not None:
        mask = shared.mask
    if query.device.type == "cpu" and _groups(module) == query.shape[1] // key.shape[1]:
        y = cpu_attention(query, key, value, mask, dropout=dropout, scale=scaling, is_causal=causal)
        y = y.transpose(1, 2).contiguous()  # (B, T, h, D)
    else:
        y, _ = sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, is_causal, **kwargs)
    if shared is not None:
        shared.hold_with(y)
    return y, None


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
        if config._attn_implementation == _STOCK:
            _set(config, NAME)


def use_no_more(model: nn.Module) -> None:
    """Undo `use`."""
    for config in _configs(model):
        if config._attn_implementation == NAME:
            _set(config, _STOCK)


def takes_attention(model: nn.Module) -> bool:
    """Whether a transformers model in `model` could use SDPA."""
    return any(module._supports_sdpa for module in _models(model))


def why_not(model: nn.Module) -> str | None:
    """Say why no transformers model in `model` can use the registered function, or return None."""
    reasons = [_why_not_this(module) for module in _models(model) if module._supports_sdpa]
    return None if None in reasons else reasons[0]


def _why_not_this(model: PreTrainedModel) -> str | None:
    implementation = model.config._attn_implementation
    if implementation not in (_STOCK, NAME):
        return f"its attention is {implementation!r}; only {_STOCK!r} (set_attn_implementation) can share masks"
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


@cache
def _asks_the_registry(cls: type[PreTrainedModel]) -> bool:
    """Whether the classes beside `cls` find their attention by name and none of them asks for "sdpa" itself."""
    source = inspect.getsource(sys.modules[cls.__module__])
    by_name = re.search(r"_attn_implementation\s*(==|!=|in|not in)\s*[\[(\"'][^\n]*[\"']sdpa[\"']", source)
    return cls._can_set_attn_implementation() and by_name is None
