"""`nn.MultiheadAttention` whose queries attend to chosen keys.

query (B, T, E), key (B, S, K), value (B, S, V), or without B, or with B second (batch_first=False). Projections are the
module's own; the attention between them is `state.attention`.
"""

from __future__ import annotations

import inspect
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import masks
from .selecting import Visibility
from .state import HoldsCodebook, attention


class SparseMultiheadAttention(HoldsCodebook):
    """Stands before `nn.MultiheadAttention` in the bases of a converted module."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`.

        Raises:
            ValueError: need_weights=True where attention is sparse, or a mask that does more than hide keys.
        """
        given = query, key, value, key_padding_mask, attn_mask, is_causal
        if query.is_nested:
            return self._nested(*given)
        batched = query.dim() == 3
        inputs = [self._batch_first(t, batched) for t in (query, key, value)]
        same = query is key and key is value
        q, k, v = self._projected(inputs, same)  # (B, h, T, D), (B, h, S, D) twice
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        see = self._visibility(shape, key_padding_mask, attn_mask, is_causal, query is key, batched)
        weights: list[Tensor] = []

        def dense() -> Tensor:
            y, found = self._dense(q, k, v, see, need_weights)
            weights.extend([] if found is None else [found])
            return y

        dropout: float = self.dropout if self.training else 0.0  # type: ignore[attr-defined]
        y = attention(self, q, k, v, see, None, dense, dropout)  # type: ignore[arg-type]
        if need_weights and not weights:
            raise ValueError(
                f"{type(self).__name__}: need_weights=True asks for the T x S weights that sparse attention never "
                "makes; pass need_weights=False"
            )
        y = self.out_proj(y.transpose(1, 2).flatten(2))  # type: ignore[attr-defined]
        if weights and average_attn_weights:
            weights = [weights[0].mean(1)]
        if not batched:
            return y.squeeze(0), weights[0].squeeze(0) if weights else None
        return y if self.batch_first else y.transpose(0, 1), weights[0] if weights else None  # type: ignore[attr-defined]

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)  # type: ignore[attr-defined]

    def _projected(self, inputs: list[Tensor], same: bool) -> list[Tensor]:
        """The heads of queries, keys and values."""
        bias: Tensor | None = self.in_proj_bias  # type: ignore[attr-defined]
        if self._qkv_same_embed_dim and same:  # type: ignore[attr-defined]
            projected = F.linear(inputs[0], self.in_proj_weight, bias).chunk(3, dim=-1)  # type: ignore[attr-defined]
        else:
            if self._qkv_same_embed_dim:  # type: ignore[attr-defined]
                matrices = self.in_proj_weight.chunk(3)  # type: ignore[attr-defined]
            else:
                matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)  # type: ignore[attr-defined]
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = tuple(F.linear(x, w, b) for x, w, b in zip(inputs, matrices, biases, strict=True))
        heads: int = self.num_heads  # type: ignore[attr-defined]
        return [t.unflatten(2, (heads, -1)).transpose(1, 2) for t in projected]

    def _visibility(
        self,
        shape: tuple[int, int, int, int],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        to_itself: bool,
        batched: bool,
    ) -> Visibility:
        batch, heads, rows, keys = shape
        if is_causal and attn_mask is None:
            raise ValueError(f"{type(self).__name__}: is_causal=True needs attn_mask, as in nn.MultiheadAttention")
        padding = _inverted(key_padding_mask)
        if padding is not None and not batched:
            padding = padding[None]
        seen = masks.visible(padding, shape, heads, type(self).__name__)
        if attn_mask is not None and not is_causal:
            # (T, S), or (B h, T, S).
            by_head = _inverted(attn_mask)
            assert by_head is not None
            by_head = by_head[None, None] if by_head.dim() == 2 else by_head.unflatten(0, (batch, -1))
            of_heads = masks.visible(by_head, shape, heads, type(self).__name__)
            assert of_heads is not None
            seen = of_heads if seen is None else seen & of_heads
        local = is_causal or to_itself or (attn_mask is not None and rows == keys)
        return Visibility(seen, is_causal, 0, 0, local)

    def _dense(
        self, q: Tensor, k: Tensor, v: Tensor, see: Visibility, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        dropout: float = self.dropout if self.training else 0.0  # type: ignore[attr-defined]
        mask = see.mask
        if see.is_causal and (mask is not None or need_weights):
            causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            mask = causal if mask is None else mask & causal
        if not need_weights:
            causal_alone = see.is_causal and mask is None
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal_alone), None
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = F.dropout(scores.softmax(-1), dropout)
        return weights @ v, weights

    def _nested(self, *given: Any) -> tuple[Tensor, None]:
        """What `nn.TransformerEncoder` passes in evaluation with a padding mask: sequences of several lengths."""
        query, key, value, key_padding_mask, attn_mask, _ = given
        if not (query is key and key is value) or key_padding_mask is not None or attn_mask is not None:
            raise ValueError(f"{type(self).__name__}: nested tensors are taken for self-attention without masks only")
        lengths = [len(sequence) for sequence in query.unbind()]
        padded = query.to_padded_tensor(0.0)
        places = torch.arange(padded.shape[1], device=padded.device)
        padding = places >= torch.tensor(lengths, device=padded.device)[:, None]
        y, _ = self.forward(padded, padded, padded, key_padding_mask=padding, need_weights=False)
        return torch.nested.nested_tensor([row[:n] for row, n in zip(y, lengths, strict=True)]), None

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes that one training forward of self-attention keeps on N = B T tokens, where it is sparse.

        The input, queries, keys, values and the output of attention, N E elements each, and one number of at least
        float32 for each token and head.
        """
        tokens = prod(input_shape[:-1])
        statistics = torch.promote_types(dtype, torch.float32).itemsize * self.num_heads  # type: ignore[attr-defined]
        return tokens * (5 * input_shape[-1] * dtype.itemsize + statistics)


def keys_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """The keys (B, h, S, D) of a call of an `nn.MultiheadAttention`, and which are no padding, (B, S) or None."""
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
    key: Tensor = given["key"]
    padding = _inverted(given.get("key_padding_mask"))
    if key.is_nested:
        lengths = torch.tensor([len(sequence) for sequence in key.unbind()], device=key.device)
        key = key.to_padded_tensor(0.0)
        padding = torch.arange(key.shape[1], device=key.device) < lengths[:, None]
    elif key.dim() == 2:
        key, padding = key[None], None if padding is None else padding[None]
    elif not module.batch_first:
        key = key.transpose(0, 1)
    if padding is not None and padding.dtype != torch.bool:
        padding = padding == 0
    weight, bias = module.k_proj_weight, module.in_proj_bias
    if module._qkv_same_embed_dim:
        weight = module.in_proj_weight.chunk(3)[1]  # type: ignore[operator]
    keys = F.linear(key, weight, None if bias is None else bias.chunk(3)[1])  # type: ignore[arg-type, operator]
    return keys.unflatten(2, (module.num_heads, -1)).transpose(1, 2), padding


def _inverted(mask: Tensor | None) -> Tensor | None:
    """A mask of `nn.MultiheadAttention`, where True hides a key, the other way round; additive ones as they are."""
    return ~mask if mask is not None and mask.dtype == torch.bool else mask


def not_in_one_kernel(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: where a module has one, `nn.TransformerEncoderLayer` calls it, instead of a kernel of
    its own that reads the module's weights and would bypass the conversion."""
