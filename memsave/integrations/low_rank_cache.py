"""A cache that keeps the latents of keys and values, for generating with a model that FlashSVD converted.

Per token and layer it keeps R_k + R_v numbers instead of 2 * kv * D, or R alone where queries, keys and values come
from one fused projection; besides, once for all layers, the rotation of each token. Layers of other kinds, such as
those of sliding windows, keep what transformers' own cache keeps.

Latents are (B, S, R); cos and sin (B or 1, S, D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..errors import UnsupportedModelError
from ..nn.low_rank.heads import HeadStreaming
from ..nn.low_rank.latents import latent_widths


class LowRankLayer(DynamicLayer):
    """The latents of one layer: keys (B, 1, S, R_k) and values (B, 1, S, R_v), R_v = 0 where they are those of keys."""

    def __init__(self, table: RotationTable) -> None:
        super().__init__()
        self.table = table

    def append(self, key: Tensor, value: Tensor | None, rotation: tuple[Tensor, Tensor] | None) -> Any:
        """Add the latents (B, T, R) of new tokens; all latents, and the rotation of all tokens."""
        nothing = key.new_empty(*key.shape[:-1], 0)
        keys, values = super().update(key.unsqueeze(1), (nothing if value is None else value).unsqueeze(1))
        turned = None if rotation is None else self.table.extended(rotation, keys.shape[-2])
        return keys.squeeze(1), (keys if value is None else values).squeeze(1), turned

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "a low-rank cache holds latents, and an attention module handed it keys and values: it runs its plain "
            "forward, under autocast, with gradients, in training mode, or with hooks on its projections. Use the "
            "model's own cache there"
        )


class RotationTable(DynamicLayer):
    """The rotation of every token, once for all layers: cos and sin as keys and values (B or 1, 1, S, D)."""

    keys: Tensor
    values: Tensor

    def extended(self, rotation: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the `length` tokens so far, the last of which `rotation` (B or 1, T, D) belongs to."""
        cos, sin = (t.unsqueeze(1) for t in rotation)
        if self.get_seq_length() < length:
            if self.is_initialized and self.keys.numel():
                cos, sin = self._in_one_batch(cos), self._in_one_batch(sin)
            super().update(cos, sin)
        return self.keys.squeeze(1), self.values.squeeze(1)

    def _in_one_batch(self, new: Tensor) -> Tensor:
        """`new` for as many sequences as the table has, or the table for as many as `new` has."""
        batch = max(new.shape[0], self.keys.shape[0])
        self.keys, self.values = (t.expand(batch, -1, -1, -1) for t in (self.keys, self.values))
        return new.expand(batch, -1, -1, -1)


class LowRankCache(Cache):
    """transformers' cache with `LowRankLayer` in the place of the layers that keep latents."""

    def __init__(self, layers: list[Any], table: RotationTable) -> None:
        super().__init__(layers=layers)
        self.table = table

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self._differs_by_sequence:
            self.table.reorder_cache(beam_idx)

    def crop(self, max_length: int) -> None:
        super().crop(max_length)
        if self.table.get_seq_length():
            self.table.crop(max_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._differs_by_sequence:
            self.table.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._differs_by_sequence:
            self.table.batch_select_indices(indices)

    def reset(self) -> None:
        super().reset()
        self.table.reset()

    @property
    def _differs_by_sequence(self) -> bool:
        return self.table.get_seq_length() > 0 and self.table.keys.shape[0] > 1

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        held = [t for layer in (*self.layers, self.table) for t in (layer.keys, layer.values)]
        return sum(t.nbytes for t in held if isinstance(t, torch.Tensor))


def low_rank_cache(model: nn.Module) -> Cache:
    """A cache for `model.generate(..., past_key_values=cache)` that keeps latents where these are smaller.

    Args:
        model: a transformers model, converted with `FlashSVDConfig`; only attention modules that run by groups of heads
            ("by heads" in the report) and find their attention function by name (SDPA, not eager) have latents.

    Raises:
        UnsupportedModelError: no layer would keep latents; the reason of each kind of layer is named.
    """
    whole: Any = model.config
    config = whole.get_text_config(decoder=True)
    layers, table = list(DynamicCache(config=config).layers), RotationTable()
    reasons: dict[str, None] = {}
    found = 0
    for name, module in model.named_modules():
        index = _layer_index(module)
        if index is None or index >= len(layers) or _is_cross(name):
            continue
        reason = _why_not(module, layers[index])
        if reason is None:
            layers[index] = LowRankLayer(table)
            found += 1
        else:
            reasons[reason] = None
    if not found:
        why = "; ".join(reasons) or "no attention module of it was converted by FlashSVDConfig(fuse=True)"
        raise UnsupportedModelError(f"low_rank_cache: no layer of the model can keep latents: {why}")
    cache = LowRankCache(layers, table)
    return EncoderDecoderCache(cache, DynamicCache(config=config)) if whole.is_encoder_decoder else cache


def _layer_index(module: nn.Module) -> int | None:
    if not isinstance(module, HeadStreaming):
        return None
    inner = module.get_submodule(module._layout.inner)
    decodes = getattr(inner, "is_decoder", True) or getattr(inner, "is_causal", False)
    return getattr(inner, "layer_idx", None) if decodes else None


def _is_cross(name: str) -> bool:
    last = name.rpartition(".")[2].lower()
    return "cross" in last or "encoder" in last or last == "encdecattention"


def _why_not(module: Any, layer: Any) -> str | None:
    layout = module._layout
    if type(layer) is not DynamicLayer:
        return f"its layers of kind {type(layer).__name__} keep a window of keys and values"
    if not layout.latent:
        return "its keys are rotated or normed, or its scores capped, in a way that is not known"
    widths = latent_widths(module, layout)
    if widths is None:
        return "its keys or values are not low-rank, or have factors per head and are rotated"
    if sum(widths) >= 2 * layout.num_kv_heads * layout.head_size:
        return f"latents of {sum(widths)} numbers are not smaller than keys and values of {layout.num_kv_heads} heads"
    return None
