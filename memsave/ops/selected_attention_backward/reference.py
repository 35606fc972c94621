"""Plain PyTorch implementation of `selected_attention_backward`: tiled.py, which also serves what kernels leave out."""

from __future__ import annotations

from .tiled import selected_attention_backward, workspace_bytes

__all__ = ["selected_attention_backward", "workspace_bytes"]
