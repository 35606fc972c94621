"""Attention that runs a few heads at a time through its own forward: neither q, k, v nor its output is ever whole.

x is (B, T, d), N = B * T rows; h query heads and kv key/value heads of size D; a group is some key/value heads with the
query heads that read them. Positions, norms of heads, biases and masks need nothing of their own, and no code of a
model is copied: see `group_run.py`. Nothing is computed twice. Only without gradients. Source of the aim: FlashSVD,
arXiv 2508.01506, whose kernels compute what they stream several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..converted import Converted, is_watched
from ..eager import autocast_enabled, plain
from .group_run import Run
from .latents import Latents, latent_of
from .layout import HeadLayout, asks_by_name
from .lazy_rows import piece_bytes

GROUP_BYTES = {"cpu": 8 * 2**20}
GROUP_BYTES_ELSEWHERE = 128 * 2**20
"""How many bytes q, k, v and the output of one group of heads may take, by type of device."""
_COLLECTING = "output_capturing_hook"
"""The hooks by which transformers collects outputs; it leaves them in place. The probabilities of parts are None."""
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")
_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_OTHER_INPUTS = ("encoder_hidden_states", "key_value_states", "layer_head_mask", "head_mask")


class HeadStreaming(Converted):
    """Mixin of an attention module whose heads run in groups where that saves more than it costs."""

    @property
    def _layout(self) -> HeadLayout:
        layout: HeadLayout = self.__dict__["_memsave_heads"]
        return layout

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs.get("hidden_states")
        if not self._serves(x, args[1:], kwargs):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(x, Tensor)
        cached = _cache_in(kwargs)
        if cached is not None and (layer := _latent_layer(cached[1], self.get_submodule(self._layout.inner))):  # type: ignore[attr-defined]
            return self._with_latents(x, layer, args, kwargs, cached[0])
        if cached is not None and not _is_empty(cached[1], self.get_submodule(self._layout.inner)):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        run = Run(self, self._layout)  # type: ignore[arg-type]
        run.absorbed = run.absorbed and cached is None  # a cache holds keys and values of full size
        groups = self._groups(x, run)
        if len(groups) == 1 and not run.absorbed:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if cached is None:
            return run.by_groups(groups, args, kwargs)
        name, cache = cached
        grouped = GroupedCache(_self_attention(cache), self._layout.num_kv_heads)
        result = run.by_groups(groups, args, {**kwargs, name: grouped}, grouped)
        grouped.finish()
        return result

    def _with_latents(self, x: Tensor, layer: Any, args: Any, kwargs: Mapping[str, Any], name: str) -> Any:
        """With a cache of latents: a first pass by groups of heads, later ones against the latents of all tokens."""
        layout, past = self._layout, layer.get_seq_length()
        run = Run(self, layout)  # type: ignore[arg-type]
        made = {role: run.projected(getattr(layout, role), x) for role in ("key", "value")}
        key = latent_of(self, layout, "key", made["key"])  # type: ignore[arg-type]
        shared = layout.fused and key is made["key"]
        value = None if shared else latent_of(self, layout, "value", made["value"])  # type: ignore[arg-type]
        rotation = kwargs["position_embeddings"] if layout.latent == "rotated" else None
        whole = layer.append(key, value, rotation)
        kwargs = {**kwargs, name: _PassedOn(past)}
        if past == 0:
            return run.by_groups(self._groups(x, run), args, kwargs)
        run.absorbed = False
        run.latents = Latents(self, layout, *whole)  # type: ignore[arg-type]
        return run.by_groups([slice(0, layout.num_kv_heads)], args, kwargs)

    def _serves(self, x: object, others: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether this call may run by groups: without gradients, and as it was tried."""
        if not isinstance(x, Tensor) or x.dim() != 3 or plain(x) or autocast_enabled(x) or torch.is_grad_enabled():
            return False
        if any(hasattr(value, "get_seq_length") for value in others):
            return False  # a cache without its name, which each group would fill
        redirect = self._layout.redirect
        if redirect != asks_by_name(self.get_submodule(self._layout.inner)):  # type: ignore[attr-defined]
            return False  # the attention function is another one now than when it was tried
        if not redirect and self._forward_hooks:  # type: ignore[attr-defined]
            return False  # they may ask for the probabilities of all heads
        if not redirect and any(map(self._by_head, (*others, *kwargs.values()))):
            return False  # a bias that nobody divides
        asked = kwargs.get("output_attentions") or any(kwargs.get(name) is not None for name in _OTHER_INPUTS)
        watched = any(is_watched(module, besides=_COLLECTING) for module in self._watched())
        return not (asked or self.training or watched)  # type: ignore[attr-defined]

    def _by_head(self, value: object) -> bool:
        """Whether an argument has values for each query head."""
        return isinstance(value, Tensor) and value.dim() == 4 and 1 < value.shape[1] == self._layout.num_heads

    def _watched(self) -> Iterator[nn.Module]:
        """The modules whose calls differ by groups."""
        layout = self._layout
        names = dict.fromkeys((layout.query, layout.key, layout.value, layout.output, layout.inner, layout.tail))
        return (self.get_submodule(name) for name in names if name)  # type: ignore[attr-defined]

    def _groups(self, x: Tensor, run: Run) -> list[slice]:
        """Key/value heads that run together: as many as the budget allows."""
        head_bytes = prod(x.shape[:-1]) * 2 * (self._layout.per_kv + 1) * run.head_size * x.dtype.itemsize
        chunk_bytes = piece_bytes(self)  # type: ignore[arg-type]
        budget_bytes = GROUP_BYTES.get(x.device.type, GROUP_BYTES_ELSEWHERE) if chunk_bytes is None else 2 * chunk_bytes
        size, count = max(1, budget_bytes // max(head_bytes, 1)), self._layout.num_kv_heads
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """With gradients it is the original module; nothing is kept without."""
        raise NotImplementedError("attention streams without gradients only, where nothing is kept")


class GroupedCache:
    """Stands for an empty cache of keys and values while groups run, and hands it all heads at the end."""

    def __init__(self, cache: Any, num_kv_heads: int) -> None:
        self._cache, self._num_kv_heads = cache, num_kv_heads
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self.heads = slice(0, 0)
        self.is_updated: dict[int, bool] = {}  # of an encoder-decoder's cache: whether it holds the encoder's keys

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the heads of one group, (B, kv', T, D) each; they are all that the group attends to."""
        if self._keys is None or self._values is None:
            self._keys, self._values = (t.new_empty(t.shape[0], self._num_kv_heads, *t.shape[2:]) for t in (key, value))
        self._keys[:, self.heads], self._values[:, self.heads] = key, value
        self._arguments = (layer_idx, *args), kwargs
        return key, value

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return 0

    @property
    def self_attention_cache(self) -> GroupedCache:
        """For modules that are given an encoder-decoder's cache and take their part themselves."""
        return self

    def finish(self) -> None:
        """Give the cache what was collected."""
        args, kwargs = self._arguments
        self._cache.update(self._keys, self._values, *args, **kwargs)


class _PassedOn:
    """Stands for a cache whose latents were added already, so that attention does not read what it returns.

    Modules read off its shape how many keys there are.
    """

    def __init__(self, past_tokens: int) -> None:
        self._past_tokens = past_tokens
        self.heads = slice(0, 0)

    def update(self, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._past_tokens:
            return key, value
        shape = *key.shape[:2], self._past_tokens + key.shape[2], key.shape[3]
        return key.new_zeros(()).expand(shape), value.new_zeros(()).expand(shape)

    def get_seq_length(self, *args: Any, **kwargs: Any) -> int:
        return self._past_tokens


def _cache_in(kwargs: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The cache of keys and values among the arguments, and its name."""
    found = ((name, kwargs.get(name)) for name in _CACHES)
    return next(((name, value) for name, value in found if value is not None), None)


def _latent_layer(cache: Any, inner: nn.Module) -> Any:
    """The layer of `cache` for `inner`, if it keeps latents."""
    index, layers = getattr(inner, "layer_idx", None), getattr(_self_attention(cache), "layers", None)
    layer = layers[index] if index is not None and layers is not None and index < len(layers) else None
    return layer if hasattr(layer, "append") else None


def _self_attention(cache: Any) -> Any:
    return getattr(cache, "self_attention_cache", cache)


def _is_empty(cache: Any, inner: nn.Module) -> bool:
    """Whether `cache` holds nothing for `inner` yet and will hold whatever keys and values it is given."""
    cache = _self_attention(cache)
    index, layers = getattr(inner, "layer_idx", None), getattr(cache, "layers", None)
    if index is None or layers is None:
        return False
    layer = layers[index] if index < len(layers) else None
    return layer is None or (type(layer).__name__ in _GROWING and layer.get_seq_length() == 0)
