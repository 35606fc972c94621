"""Scaled dot-product attention whose layers share one additive mask, and that keeps no more than it must on the CPU.

q is (B, h, T, D), k and v (B, kv, S, D) with h a multiple of kv, a mask (B or 1, h or 1, T, S) or broadcast to it.

torch turns a boolean mask into an additive one in every layer, and each layer keeps its own. Here the layers that
read one boolean mask read one additive mask, as long as the graph of one of them keeps it anyway.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .attention_dropout import attend_with_dropout
from .eager import autocast_enabled, no_autocast
from .note import is_taken_over

_ALIGNMENT = 16
"""Elements between the rows of a mask on an accelerator: torch's kernels copy one that has any other distance."""


class SharedMask:
    """A float mask that several layers read; `mask` is None once one of them has run backward."""

    def __init__(self, mask: Tensor, beside: Tensor | None) -> None:
        self.mask: Tensor | None = mask
        self._beside = None if beside is None else TensorWeakRef(beside)

    def made_beside(self, other: Tensor | None) -> bool:
        """Whether `other` is the very tensor object that was given when the mask was made."""
        return self.mask is not None and (None if self._beside is None else self._beside()) is other

    def hold_with(self, output: Tensor) -> None:
        """Live for the layers to come as long as the graph of `output`, which keeps the mask itself, waits."""
        # Under hooks that take saved tensors over (checkpointing, offloading) nobody keeps the mask.
        if output.grad_fn is not None and not is_taken_over():
            output.grad_fn.register_prehook(self._release)

    def _release(self, _: object) -> None:
        self.mask = None


_shared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def shared_mask(
    source: Tensor, settings: tuple[Hashable, ...], make: Callable[[], Tensor], beside: Tensor | None = None
) -> SharedMask:
    """What `make` makes from the tensor objects `source` and `beside`, made once for the layers of one graph.

    Args:
        source, beside: used again only as the same objects with the same contents.
        settings: all else on which the result depends.
    """
    found: dict[Hashable, weakref.ref[SharedMask]] = _shared.setdefault(source, {})
    key = (settings, source._version, None if beside is None else beside._version)
    present = found[key]() if key in found else None
    if present is None or not present.made_beside(beside):
        present = SharedMask(make(), beside)
        found[key] = weakref.ref(present)
    return present


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `mask` is true and -inf elsewhere, in `dtype`; what `mask` merely repeats takes no memory here either."""
    rows = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride()[:-1])
    once = mask[rows]
    width = once.shape[-1]
    padding = 0 if mask.device.type == "cpu" else -width % _ALIGNMENT
    made = torch.zeros(*once.shape[:-1], width + padding, dtype=dtype, device=mask.device)[..., :width]
    return made.masked_fill_(~once, float("-inf")).expand(mask.shape)


def dtype_of_attention(query: Tensor) -> torch.dtype:
    """The dtype in which torch computes attention for `query`: autocast's where it applies, else its own."""
    if autocast_enabled(query) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return query.dtype


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` on the CPU, by the way that keeps least: (B, h, T, D).

    torch's fused kernel takes fewer heads in k and v than in q, masked or not, and keeps q, k, v, the output and one
    number per row. It takes no dropout: that keeps q, k, v, the mask and one bit per probability here, where torch
    keeps several tensors of (B, h, T, S).
    """
    if 0 < dropout < 1 and key.shape[2]:
        dtype = dtype_of_attention(query)
        query, key, value = (t.to(dtype) for t in (query, key, value))
        if mask is not None and mask.is_floating_point():
            mask = mask.to(dtype)
        with no_autocast(query):
            return attend_with_dropout(query, key, value, mask, dropout, scale, is_causal)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
