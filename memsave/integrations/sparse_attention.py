"""The attention function, and the masks, of transformers models in which `SparseMHAConfig` converted attention modules.

Both are registered by transformers' public registries. A converted module asks for the function by a copy of its
config; its model's own config asks for the masks, which say which keys are padding, and how far a window reaches,
without T x S numbers. Configs never write that name: `config.json` is what the plain model would write.

query is (B, h, T, D), key and value (B, kv, S, D).
"""

from __future__ import annotations

import copy
import inspect
import re
import sys
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from ..nn.attention import additive_mask, dtype_of_attention, shared_mask
from ..nn.eager import plain
from ..nn.sparse_attention import masks
from ..nn.sparse_attention.selecting import Visibility
from ..nn.sparse_attention.state import attention, state_of
from . import attention as exact
from .attention import SPARSE, SPARSE_SHARED

_UNKNOWN = ("position_bias", "s_aux", "cache", "block_table")
"""Arguments of attention functions that change the scores, or say where keys are, beyond a mask."""
_OTHER_STATES = {"key_value_states", "encoder_hidden_states", "cross_attention_states"}
"""Arguments of modules that can attend to something else than their own tokens."""
_STANDS_FOR = {"sdpa": SPARSE, exact.NAME: SPARSE_SHARED}
_CONFIG = "_memsave_config"
_READS_MASKS = re.compile(r"attention_mask\[:, (0\b|:, :)")
_ORDERED, _UNORDERED, _WINDOW = torch.int8, torch.uint8, torch.int32
"""What the dtype of a mask (B, S) says besides: causal, bidirectional, or causal within a window."""


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
    """What transformers' `sdpa_attention_forward` returns, (B, T, h, D), for chosen keys in a converted module.

    Raises:
        ValueError: the model gives a bias, a sink or a paged cache, or a mask that does more than hide keys.
    """
    see = _visibility(module, query, key, attention_mask, is_causal)
    settings = {"dropout": dropout, "scaling": scaling, **kwargs}
    dense = partial(_dense, module, query, key, value, see, attention_mask, **settings)
    if state_of(module) is None:
        return dense(), None
    if given := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__}: sparse attention knows queries, keys, values and a mask, but the model gives "
            f"{', '.join(given)}, too; leave this module out of target_modules"
        )
    y = attention(module, query, key, value, see, scaling, lambda: dense().transpose(1, 2), dropout)
    return y.transpose(1, 2).contiguous(), None


def _visibility(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None
) -> Visibility:
    """What the queries see, as in transformers: a mask of T x S says it all; one of S leaves out the order."""
    rows, keys = query.shape[2], key.shape[2]
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    ordered = mask is None and causal
    if mask is not None and mask.dim() == 2:  # the model's mask says the order, whatever the module says of itself
        ordered = mask.dtype in (_ORDERED, _WINDOW) or (causal and mask.dtype != _UNORDERED)
    local = ordered or (rows == keys and (causal or _attends_to_itself(module)))
    window = 0
    if mask is not None and mask.dim() == 2 and mask.dtype == _WINDOW:
        window = int(mask.max()) - 1
    shape = (query.shape[0], query.shape[1], rows, keys)
    seen = masks.visible(mask, shape, key.shape[1], type(module).__name__)
    # Without a mask several queries stand beside the first keys, as torch reads `is_causal`; else beside the last ones.
    position = 0 if mask is None and rows > 1 else keys - rows
    return Visibility(seen, ordered and rows > 1, window, position, local)


def _attends_to_itself(module: nn.Module) -> bool:
    """Whether the keys are surely those of the queries' own tokens, from what the module says of itself."""
    said = [getattr(module, name, None) for name in ("is_decoder", "is_cross_attention")]
    if True in said or "Cross" in type(module).__name__:
        return False
    cls: Any = type(module)
    return False in said or not _takes_other_states(cls)


@cache
def _takes_other_states(cls: Any) -> bool:
    return not _OTHER_STATES.isdisjoint(inspect.signature(cls.forward).parameters)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    see: Visibility,
    mask: Tensor | None,
    **settings: Any,
) -> Tensor:
    """Attention to all keys, (B, T, h, D), by the function that shares masks between layers."""
    causal, shared = see.is_causal, None
    if mask is not None and mask.dim() == 2:
        causal = False
        if plain(query) or not torch.is_grad_enabled():
            mask = _whole_mask(see, query)
        else:
            dtype = dtype_of_attention(query)
            kind = query.shape[2], key.shape[2], see.is_causal, see.window, dtype
            shared = shared_mask(mask, kind, lambda: additive_mask(_whole_mask(see, query), dtype))
            mask = shared.mask
    y, _ = exact.attention_forward(module, query, key, value, mask, is_causal=causal, **settings)
    if shared is not None:
        shared.hold_with(y)
    return y


def _whole_mask(see: Visibility, query: Tensor) -> Tensor:
    """The mask (B or 1, 1, T, S) that `see` stands for."""
    rows, keys = query.shape[2], query.shape[2] + see.position
    own = torch.arange(rows, device=query.device)[:, None] + see.position
    places = torch.arange(keys, device=query.device)
    seen = torch.ones(1, 1, rows, keys, dtype=torch.bool, device=query.device) if see.mask is None else see.mask
    if see.is_causal:
        seen = seen & (places <= own)
    if see.window:
        seen = seen & (places > own - see.window)
    return seen.expand(-1, -1, rows, keys)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a model's layers: None, padding (B, S), or transformers' own (B, 1, T, S) where that does not say it.

    The dtype of padding says in which order tokens are seen; in a sliding window it is 0 for padding and the window's
    size plus 1 elsewhere. Where several queries stand beside the last of more keys, it says so even if there is none:
    without a mask they would stand beside the first, as in torch. A caller that forbids to skip a mask, to put several
    together, gets transformers' own.
    """
    given = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )
    at_the_end = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    window = local_size if local_size is not None and local_size < kv_length else 0
    ordered = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    if window or not ordered:
        ordered = allow_is_causal_skip and local_size is not None and _is_window(mask_function, given)
    bidirectional = mask_function is bidirectional_mask_function
    skips = kwargs.get("allow_is_bidirectional_skip", True) if bidirectional else allow_is_causal_skip
    if not (at_the_end and ordered and skips):
        made: Tensor | None = sdpa_mask(**given)
        return made
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        padding = None if padding.all() else padding
    if padding is None and (window or 1 < q_length < kv_length):
        padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
    if padding is None:
        return None
    if window:
        return padding.to(_WINDOW) * (window + 1)
    return padding.to(_UNORDERED if bidirectional else _ORDERED)


def _is_window(mask_function: Any, given: dict[str, Any]) -> bool:
    """Whether the function is that of a causal sliding window, from what it says of some queries in a row.

    Chunks have a `local_size`, too, but a key is not seen longer than its chunk lasts.
    """
    rows, keys, size = given["q_length"], given["kv_length"], given["local_size"]
    device = given.get("device", "cpu")
    queries = torch.arange(max(0, rows - 3), rows, device=device)[:, None] + given["q_offset"]
    places = torch.arange(keys, device=device) + given["kv_offset"]
    first = torch.zeros((), dtype=torch.long, device=device)
    said = mask_function(first, first, queries, places)
    return bool(torch.equal(said.expand(queries.shape[0], keys), (places <= queries) & (places > queries - size)))


def register() -> None:
    """Make function and masks known to transformers; any number of times."""
    for name in (SPARSE, SPARSE_SHARED):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)


def why_not(module: nn.Module) -> str | None:
    """Say why an attention module of transformers cannot be converted, or return None."""
    implementation = module.config._attn_implementation  # type: ignore[union-attr]
    known = (*_STANDS_FOR, *_STANDS_FOR.values())
    if implementation not in known:
        return f"its attention is {implementation!r}; only 'sdpa' (set_attn_implementation) can be converted"
    source = inspect.getsource(sys.modules[type(module).__module__])
    if "ALL_ATTENTION_FUNCTIONS" not in source or exact.asks_for_sdpa(source):
        return f"the code of {type(module).__name__} chooses its attention without transformers' registry"
    if _READS_MASKS.search(source):
        return f"the code of {type(module).__name__} reads the whole mask of T x S itself, to choose keys of its own"
    return None


def use(module: nn.Module) -> None:
    """Let `module` call the registered function, and its model make the registered masks."""
    register()
    config: Any = module.config
    name = _STANDS_FOR.get(config._attn_implementation, config._attn_implementation)
    config._attn_implementation_internal = name
    mine = copy.copy(config)
    mine._attn_implementation_internal = name
    module.__dict__[_CONFIG] = config
    module.config = mine


def use_no_more(module: nn.Module) -> None:
    """Undo `use`. Other converted modules of the model go on, with the masks of the plain model."""
    config = module.__dict__.pop(_CONFIG, None)
    if config is None:
        return
    back = {sparse: name for name, sparse in _STANDS_FOR.items()}
    config._attn_implementation_internal = back.get(config._attn_implementation, config._attn_implementation)
    module.config = config
