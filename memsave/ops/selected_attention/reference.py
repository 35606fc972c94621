"""Plain PyTorch implementation of `selected_attention`: tiled.py, which also serves what the kernels leave out."""

from __future__ import annotations

from .tiled import selected_attention, workspace_bytes

__all__ = ["selected_attention", "workspace_bytes"]
