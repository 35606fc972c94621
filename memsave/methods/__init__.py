"""The methods: one file each, named after its paper. A new method adds its config to METHODS."""

from .linear_cross_entropy import LinearCrossEntropyConfig
from .recompute_norm import RecomputeNormConfig
from .wta_crs import WTACRSConfig

METHODS = (LinearCrossEntropyConfig, RecomputeNormConfig, WTACRSConfig)

__all__ = ["METHODS", "LinearCrossEntropyConfig", "RecomputeNormConfig", "WTACRSConfig"]
