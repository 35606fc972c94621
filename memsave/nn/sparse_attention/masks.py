"""Masks of all kinds, read as what sparse attention takes: which keys a query sees, and nothing else.

B sequences, h query and kv key/value heads, T queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.weak import WeakTensorKeyDictionary

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def visible(mask: Tensor | None, shape: tuple[int, int, int, int], groups: int, where: str) -> Tensor | None:
    """A mask of any kind as bool (B or 1, kv or 1, T or 1, S), True where a query sees a key.

    Args:
        mask: (B, S): which keys are no padding, bool or integers; or what broadcasts to (B, h, T, S), or its first S
            keys: bool, or additive with 0 where a key is seen and -inf, or the least number of the dtype, where not.
        shape: (B, h, T, S).
        groups: kv.
        where: the module, for messages.

    Raises:
        ValueError: a mask that changes scores instead of hiding keys, one that differs between the query heads of a
            key/value head, or one of another shape.
    """
    if mask is None:
        return None
    batch, heads, rows, keys = shape
    seen = _as_bool(mask, where)
    if seen.dim() == 2 and seen.shape == (batch, keys):
        return seen[:, None, None]
    if seen.dim() == 4:
        seen = seen[..., :keys]
    full = tuple(size in (1, of) for size, of in zip(seen.shape, shape, strict=True)) if seen.dim() == 4 else (False,)
    if not all(full) or seen.shape[3] != keys:
        raise ValueError(
            f"{where}: expected an attention mask of shape (B, S) = {(batch, keys)} or one that broadcasts to "
            f"(B, h, T, S) = {shape}; got {tuple(mask.shape)}"
        )
    if seen.shape[1] not in (1, groups):
        raise ValueError(
            f"{where}: the query heads of one of the {groups} key/value heads attend to the same keys, but the "
            f"attention mask has {seen.shape[1]} heads of its own; give one mask for all heads"
        )
    return seen


def _as_bool(mask: Tensor, where: str) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    known = _read.get(mask)
    if known is not None and known[0] == mask._version:
        return known[1]
    seen = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not is_fake(mask) and not bool((seen | hidden).all()):
        raise ValueError(
            f"{where}: the attention mask adds something else to the scores than 0 and -inf (a bias of positions, such "
            "as ALiBi or T5's, or a learned one). Keys are chosen by queries and keys alone, so such a model cannot be "
            "converted; leave this module out of target_modules"
        )
    _read[mask] = mask._version, seen
    return seen
