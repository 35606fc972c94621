"""Which modules compute attention in a way that can be made sparse, and the class of those of transformers."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from ..converted import original_class
from .state import HoldsCodebook


class SparseAttention(HoldsCodebook):
    """Stands before the class of an attention module of transformers, whose forward stays its own.

    The attention function that it calls finds what it needs in the module (`state.py`).
    """

    def reference(self, x: Tensor) -> Tensor:
        raise TypeError("an attention module takes more than one tensor; compare with ops.selected_attention")

    def kept_bytes(self, input_shape: tuple[int, ...], dtype: torch.dtype) -> int:
        raise TypeError("what the module keeps besides is its own; see memsave.nn.sparse_attention.function.kept_bytes")


def is_multihead(module: nn.Module) -> bool:
    """Whether `module` is an `nn.MultiheadAttention`, converted or not."""
    return original_class(module) is nn.MultiheadAttention


def head_size(module: nn.Module) -> int | None:
    """Features of a head of an attention module, or None if it does not say."""
    return getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)


def takes_attention(module: nn.Module) -> bool:
    """Whether `module` is an attention module of transformers: it looks its attention function up by its config."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    forward = inspect.unwrap(original_class(module).forward)
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False
