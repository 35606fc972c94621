"""Lazy logits: what the head of a language model returns so that its loss never needs the logits of all tokens.

hidden is (..., D); logits (..., V); N tokens.

A `LazyLogits` has the shape, dtype and device of the logits, but no values. It remembers what the head was called with
and the steps taken since: reshaping, slices over tokens, casts, multiplication by a number, tanh (a softcap). Where
`F.cross_entropy` gets one, `linear_cross_entropy` computes the loss from the hidden states.

Everything else needs the values. Then the head and the steps run as they would have, and the object turns into an
ordinary tensor (`torch.utils.swap_tensors`), so that whoever holds it sees the same writes. Views that were taken
before become views of it. Where torch refuses the swap, the values stand for the object in every later call.

A custom `autograd.Function` takes tensors without asking `__torch_function__`. For those, the object has a node of its
own in autograd's graph, which makes the logits again in backward.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..eager import autocast_now, product_dtype
from ..linear_cross_entropy import CHUNK_BYTES
from .handle import LazyLogits, new_handle
from .state import Call, State, Whole

__all__ = ["LazyLogits", "LazyOutput", "lazy_linear"]


class LazyOutput(NamedTuple):
    """The part `output` of a linear: from how many bytes of logits on they are lazy."""

    min_logits_bytes: int

    def serves(self, head: nn.Module, x: Tensor) -> bool:
        """Whether the logits of x (..., D) are better lazy: their loss then keeps fewer bytes, and time is not lost.

        Not where the weight may be gone when the loss is computed: sharded by tensors (DTensor), by a unit of the head
        alone (FSDP2), by a flat parameter (FSDP1) or by ZeRO-3.
        """
        weight: Tensor = head.weight  # type: ignore[assignment]
        if not all(type(t) in (Tensor, nn.Parameter, FakeTensor) or isinstance(t, FakeTensor) for t in (x, weight)):
            return False
        if not isinstance(weight, nn.Parameter) or hasattr(weight, "ds_id") or x.is_inference() or x.is_meta:
            return False
        if any(cls.__name__ == "FSDPModule" for cls in type(head).__mro__):
            return False
        num_classes, features = weight.shape
        num_tokens = x.numel() // max(features, 1)
        dtype = product_dtype(x, weight)
        loss_itemsize = max(dtype.itemsize, torch.float32.itemsize)
        logits_bytes = num_tokens * num_classes * loss_itemsize
        if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
            return logits_bytes > max(CHUNK_BYTES, self.min_logits_bytes)
        # The hidden states, as long as the logits are held, and the gradients that the loss makes in forward.
        kept_bytes = num_tokens * features * dtype.itemsize * (1 + x.requires_grad)
        if weight.requires_grad:
            kept_bytes += num_classes * (features + 1) * loss_itemsize
        return logits_bytes >= self.min_logits_bytes and kept_bytes < logits_bytes


def lazy_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """The lazy F.linear(x, weight, bias); x (..., D), weight (V, D), bias (V,)."""
    context = autocast_now(x) if torch.amp.is_autocast_available(x.device.type) else nullcontext
    call = Call(x, weight, bias, context, torch.is_grad_enabled())
    with _disable_current_modes():
        form = torch.empty(*x.shape[:-1], weight.shape[0], dtype=product_dtype(x, weight), device="meta")
    return new_handle(State(call, Whole(), (), form, x))
