"""The attention function that stands before a model's own while a group of its heads runs (`nn/low_rank/heads.py`).

It gives the function of that name what belongs to the heads of the group: biases and masks that differ by head.

query is (B, h', T, D), key and value (B, kv', S, D) of h' and kv' heads; a bias (1 or B, h, T, S) of all h heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..nn.low_rank.group_run import ATTENTION
from ..nn.low_rank.layout import HeadGroup


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """What the model's own attention function returns for the group of heads that runs."""
    group: HeadGroup = module.__dict__["_memsave_group"]
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _of_group(kwargs["position_bias"], group)
    mask = None if attention_mask is None else _of_group(attention_mask, group)
    if group.seen is not None:
        group.seen.append((query, key, kwargs))
    if group.latents is not None:
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return group.latents.attend(query, mask, scale, kwargs.get("position_bias")), None
    function = ALL_ATTENTION_FUNCTIONS[group.implementation]
    result: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **kwargs)
    return result


def _of_group(tensor: Tensor, group: HeadGroup) -> Tensor:
    by_head = tensor.dim() == 4 and tensor.shape[1] == group.layout.num_heads
    return tensor[:, group.query_heads] if by_head else tensor


def register() -> None:
    """Make the function known to transformers; any number of times."""
    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
