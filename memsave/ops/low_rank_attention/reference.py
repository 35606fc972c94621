"""Plain PyTorch implementation of `low_rank_attention`: tiled.py, which also serves what the kernels leave out."""

from __future__ import annotations

from .tiled import low_rank_attention, workspace_bytes

__all__ = ["low_rank_attention", "workspace_bytes"]
