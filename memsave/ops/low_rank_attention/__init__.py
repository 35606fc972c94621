"""Attention whose keys and values stay in rank space: they are rebuilt some at a time, and never there in full.

B sequences, h query and kv key/value heads (h a multiple of kv), T queries, S keys, head size D, ranks Rk and Rv.
Query head i reads key/value head i // (h / kv), in the biases too. Shao et al. 2025 (FlashSVD), arXiv 2508.01506.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check
from .._library import register
from . import reference

_op = register(
    "low_rank_attention(Tensor query, Tensor key_latent, Tensor key_factor, Tensor? key_bias, Tensor value_latent, "
    "Tensor value_factor, Tensor? value_bias, float scale, Tensor? cos, Tensor? sin, Tensor? norm_weight, "
    "float norm_eps, Tensor? mask, bool is_causal) -> Tensor",
    fake=lambda query, *_: query.new_empty((query.shape[0], query.shape[2], query.shape[1], query.shape[3])),
    reference=reference,
    kernels=("triton",),
)


def low_rank_attention(
    query: Tensor,
    key_latent: Tensor,
    key_factor: Tensor,
    key_bias: Tensor | None,
    value_latent: Tensor,
    value_factor: Tensor,
    value_bias: Tensor | None,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """softmax(scale * query K^T + mask) V for K = rotate(norm(key_latent key_factor^T + key_bias)), V likewise.

    Computed at least in float32. A row of queries that sees no key gives zeros, without the bias of the values.

    Args:
        query: (B, h, T, D) floating point, any strides, as all others: already rotated and normed.
        key_latent: (B, S, Rk) dtype of query: what the keys of all heads are rebuilt from.
        key_factor: (kv * D, Rk) dtype of query.
        key_bias: (kv * D,) dtype of query, or None.
        value_latent, value_factor, value_bias: the same of the values, (B, S, Rv), (kv * D, Rv), (kv * D,) or None.
        scale: of the scores; give it and what follows by name.
        cos, sin: (B or 1, S, D) dtype of query, or both None: K * cos + rotate_half(K) * sin, as in a Llama.
        norm_weight: (D,) dtype of query: the weight of an RMSNorm of each head of the keys before they are rotated
            (Qwen3), as it is multiplied with; None for no norm.
        norm_eps: added to its mean square.
        mask: bool (True: seen) or dtype of query (added to the scores), of a shape that broadcasts to (B, h, T, S).
        is_causal: query t sees key j only for j <= t + S - T: the last query sees all, as with a cache.

    Returns:
        (B, T, h, D), contiguous, dtype of query.

    Raises:
        ValueError: a tensor of another shape or dtype, tensors on several devices, one of cos and sin alone, an odd D
            with them.
        RuntimeError: an input requires grad while grad mode is on.
    """
    _check.floating("query", query, 4)
    _check_side("key", query, key_latent, key_factor, key_bias)
    _check_side("value", query, value_latent, value_factor, value_bias)
    _check_pair(query, key_latent, key_factor, value_latent, value_factor)
    _check_rotation(query, key_latent, cos, sin)
    if norm_weight is not None:
        _check.typed("norm_weight", norm_weight, query.dtype, 1)
        _check.length("norm_weight", norm_weight, query.shape[3], "features of a head")
    _check_mask(query, key_latent, mask)
    _check.same_device(query=query, key_latent=key_latent, key_factor=key_factor, key_bias=key_bias)
    _check.same_device(query=query, value_latent=value_latent, value_factor=value_factor, value_bias=value_bias)
    _check.same_device(query=query, cos=cos, sin=sin, norm_weight=norm_weight, mask=mask)
    tensors = query, key_latent, key_factor, key_bias, value_latent, value_factor, value_bias
    return _op(*tensors, scale, cos, sin, norm_weight, norm_eps, mask, is_causal)


def _check_side(name: str, query: Tensor, latent: Tensor, factor: Tensor, bias: Tensor | None) -> None:
    """The latents, the factor and the bias of keys or of values."""
    _check.typed(f"{name}_latent", latent, query.dtype, 3)
    _check.typed(f"{name}_factor", factor, query.dtype, 2)
    _check.length(f"{name}_latent", latent, query.shape[0], "sequences of query")
    if latent.shape[2] != factor.shape[1]:
        raise ValueError(
            f"{name}_latent and {name}_factor must have one rank as their last size; "
            f"got {tuple(latent.shape)} and {tuple(factor.shape)}."
        )
    if bias is not None:
        _check.typed(f"{name}_bias", bias, query.dtype, 1)
        _check.length(f"{name}_bias", bias, factor.shape[0], f"rows of {name}_factor")


def _check_pair(
    query: Tensor, key_latent: Tensor, key_factor: Tensor, value_latent: Tensor, value_factor: Tensor
) -> None:
    """Keys and values have the same number, and heads that fit those of query."""
    if key_latent.shape[1] != value_latent.shape[1]:
        raise ValueError(
            f"key_latent and value_latent must have as many keys; "
            f"got {tuple(key_latent.shape)} and {tuple(value_latent.shape)}."
        )
    _, heads, _, features = query.shape
    rows = key_factor.shape[0]
    if features < 1 or rows < 1 or rows % features or heads % (rows // features):
        raise ValueError(
            f"key_factor must have kv * D rows, where D is the last size of query, {features}, and the {heads} heads "
            f"of query are a multiple of kv; got {rows} rows."
        )
    _check.length("value_factor", value_factor, rows, "rows of key_factor")


def _check_rotation(query: Tensor, key_latent: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError(f"cos and sin must be given together; got no {'cos' if cos is None else 'sin'}.")
    if query.shape[3] % 2:
        raise ValueError(f"heads that are rotated must have an even size; got D = {query.shape[3]}.")
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check.typed(name, tensor, query.dtype, 3)
        batch, keys, features = tensor.shape
        if batch not in (1, query.shape[0]) or (keys, features) != (key_latent.shape[1], query.shape[3]):
            raise ValueError(
                f"{name} must have the shape (B or 1, S, D) = ({query.shape[0]} or 1, {key_latent.shape[1]}, "
                f"{query.shape[3]}); got {tuple(tensor.shape)}."
            )


def _check_mask(query: Tensor, key_latent: Tensor, mask: Tensor | None) -> None:
    if mask is None:
        return
    full = (*query.shape[:3], key_latent.shape[1])
    if mask.dtype not in (torch.bool, query.dtype):
        raise ValueError(f"mask must be bool or have the dtype of query, {query.dtype}; got {mask.dtype}.")
    short = len(full) - mask.ndim
    if short < 0 or any(size not in (1, of) for size, of in zip(mask.shape, full[short:], strict=True)):
        raise ValueError(f"mask must broadcast to (B, h, T, S) = {full}; got {tuple(mask.shape)}.")
