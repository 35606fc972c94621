"""The methods: one file each, named after its paper. A new method adds its config to METHODS."""

from .recompute_norm import RecomputeNormConfig
from .share_mask import ShareMaskConfig
from .wta_crs import WTACRSConfig

METHODS = (RecomputeNormConfig, ShareMaskConfig, WTACRSConfig)

__all__ = ["METHODS", "RecomputeNormConfig", "ShareMaskConfig", "WTACRSConfig"]
